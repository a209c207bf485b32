#!/usr/bin/env bash
# A real S3 server (Ceph's radosgw) on loopback, its data in memory.
#   radosgw.sh up DIR PORT    prints the endpoint when it answers; takes PORT and the two after it
#   radosgw.sh down DIR       ends what `up` started
# Needs Debian's ceph-mon, ceph-osd, radosgw and ceph-common. Access key AKTESTKEY12345678, secret
# key SK1234567890SECRET.
set -euo pipefail
verb=${1:?up or down} dir=$(realpath -m "${2:?DIR}")

if [ "$verb" = down ]; then
  for name in rgw osd mon; do
    if [ -f "$dir/$name.pid" ]; then kill -KILL "$(cat "$dir/$name.pid")" 2>/dev/null || true; fi
  done
  exit 0
fi

port=${3:?PORT} mon=$((${3} + 1)) mon_v1=$((${3} + 2))
rm -rf "$dir"
mkdir -p "$dir"/{run,mon,osd,log,rgw}
cd "$dir"
fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)
cat > ceph.conf <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon,v1:127.0.0.1:$mon_v1]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# Without authentication there is no key to encrypt by.
ms mon client mode = crc
ms client mode = crc
# One copy of everything, in memory.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
osd objectstore = memstore
memstore device bytes = 2147483648
mon data = $dir/mon
osd data = $dir/osd
rgw data = $dir/rgw
run dir = $dir/run
admin socket = $dir/run/\$name.asok
log file = $dir/log/\$name.log
mon cluster log file = $dir/log/cluster.log
keyring = $dir/keyring
rgw dns name = 127.0.0.1
CONF
: > keyring
as_root=(-c ceph.conf --setuser root --setgroup root)
monmaptool --create --clobber --addv a "[v2:127.0.0.1:$mon,v1:127.0.0.1:$mon_v1]" \
  --fsid "$fsid" monmap > log/monmap.out
ceph-mon "${as_root[@]}" --mkfs -i a --monmap monmap > log/mkfs.out 2>&1
ceph-mon "${as_root[@]}" -i a -f > log/mon.out 2>&1 & echo $! > mon.pid
ceph -c ceph.conf osd new "$osd" > log/osd-new.out
ceph-osd "${as_root[@]}" -i 0 --mkfs --osd-uuid "$osd" >> log/mkfs.out 2>&1
ceph-osd "${as_root[@]}" -i 0 -f > log/osd.out 2>&1 & echo $! > osd.pid
radosgw "${as_root[@]}" -n client.admin -f \
  --rgw-frontends "beast endpoint=127.0.0.1:$port tcp_nodelay=1" > log/rgw.out 2>&1 & echo $! > rgw.pid
# Half a minute on an idle machine.
for _ in $(seq 720); do
  if curl -s -o /dev/null "http://127.0.0.1:$port/"; then answers=yes; break; fi
  sleep 0.25
done
[ "${answers:-no}" = yes ] || { echo "radosgw does not answer: see $dir/log" >&2; exit 1; }
radosgw-admin -c ceph.conf user create --uid=test --display-name=test \
  --access-key=AKTESTKEY12345678 --secret-key=SK1234567890SECRET > log/user.out 2>&1
echo "http://127.0.0.1:$port"
