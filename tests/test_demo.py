"""The demo, in sizes of seconds: its data, its training, and the whole of it in this process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdmerge import demo, demo_models
from svdmerge.core.params import Action, action_of
from svdmerge.demo_models import Training, read_examples, rotations, train_model
from svdmerge.errors import OutputError
from svdmerge.recipe import load_recipe
from svdmerge.storage.checkpoint import open_checkpoint

TINY = demo.DemoSettings(
    width=16, depth=1, num_train=200, num_test=100, base_epochs=1, source_epochs=1, tune_epochs=1
)


def units(folder: Path, settings: demo.DemoSettings = TINY) -> tuple[Training, list[Training]]:
    demo.write_examples(folder, settings=settings)
    base = demo.base_unit(folder, settings=settings)
    return base, demo.source_units(folder, settings=settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and two sources."""
    folder = tmp_path_factory.mktemp("demo")
    base, sources = units(folder)
    for unit in (base, *sources[:2]):
        train_model(unit)
    return folder


def contents(file: Path) -> set[bytes]:
    return {image.numpy().tobytes() for image in read_examples(file)[0]}


def test_no_image_is_in_two_of_the_three_parts(tmp_path: Path) -> None:
    demo.write_examples(tmp_path, settings=demo.DemoSettings())
    learn, target, test = (
        contents(tmp_path / "data" / f"{name}.parquet") for name in ("sources", "target", "test")
    )
    assert [len(learn), len(target), len(test)] == [1000, 50, 497]
    assert not learn & target
    assert not (learn | target) & test


def test_trainings_read_no_file_but_the_sources_images(tmp_path: Path) -> None:
    base, sources = units(tmp_path)
    assert {u.examples for u in (base, *sources)} == {str(tmp_path / "data" / "sources.parquet")}


def test_the_target_has_as_many_examples_of_each_digit_as_asked(tmp_path: Path) -> None:
    demo.write_examples(tmp_path, settings=replace(TINY, shots=3))
    images, digits = read_examples(tmp_path / "data" / "target.parquet")
    assert torch.bincount(digits).tolist() == [3] * 10
    assert images.shape == (30, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


def test_all_answers_together_tell_the_digits_apart_and_no_single_one_does() -> None:
    answers = {tuple(d in yes for yes in demo.QUESTIONS.values()) for d in range(10)}
    assert len(answers) == 10
    assert all(2 < len(yes) < 8 for yes in demo.QUESTIONS.values())


def test_rotations_turn_each_image_back_after_four_quarters() -> None:
    images = torch.arange(128.0).reshape(2, 64)
    turned, labels = rotations(images)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(turned[:2], images)
    torch.testing.assert_close(turned[4:6], images.flip(1))  # half a turn reverses the pixels


def test_base_and_sources_are_checkpoints_of_one_architecture(made: Path) -> None:
    base = open_checkpoint(str(made / "base"))
    assert base.config["model_type"] == "svdmerge-digits"
    for name in list(demo.QUESTIONS)[:2]:
        source = open_checkpoint(str(made / "sources" / name))
        assert source.config == base.config
        assert {n: (t.dtype, t.shape) for n, t in source.tensors.items()} == {
            n: (t.dtype, t.shape) for n, t in base.tensors.items()
        }


def test_default_policies_keep_embeddings_average_vectors_and_decompose_the_rest(
    made: Path,
) -> None:
    actions = {
        name: action_of(
            name, shape=ref.shape, floating=True, policies=(), vocab_size=None,
            matrix_action=Action.DECOMPOSE,
        )
        for name, ref in open_checkpoint(str(made / "base")).tensors.items()
    }  # fmt: skip
    kept = {name for name, action in actions.items() if action is Action.BASE}
    assert kept == {"position_embedding", "patch_embed.weight", "patch_embed.bias"}
    assert actions["blocks.0.norm1.weight"] is actions["blocks.0.query.bias"] is Action.AVERAGE
    assert sum(action is Action.DECOMPOSE for action in actions.values()) == 6 * TINY.depth


def test_every_matrix_of_a_source_differs_from_the_base(made: Path) -> None:
    base = load_file(made / "base" / "model.safetensors")
    source = load_file(made / "sources" / "odd" / "model.safetensors")
    assert [n for n in base if base[n].ndim == 2 and torch.equal(base[n], source[n])] == []


def test_the_public_builder_takes_a_folder_back(made: Path) -> None:
    checkpoint = open_checkpoint(str(made / "base"))
    model = demo.build(dict(checkpoint.config))
    assert model.state_dict().keys() == checkpoint.tensors.keys()
    images, _ = read_examples(made / "data" / "test.parquet")
    assert model(images).shape == (TINY.num_test, TINY.width)


def test_the_same_training_in_another_folder_gives_the_same_bytes(
    made: Path, tmp_path: Path
) -> None:
    base, sources = units(tmp_path)
    torch.manual_seed(12345)  # whatever was drawn before is no part of the result
    for unit in (base, sources[0]):
        train_model(unit)
    for name in ("base", "sources/odd"):
        for file in ("model.safetensors", "training.yml"):
            assert (tmp_path / name / file).read_bytes() == (made / name / file).read_bytes()


def test_training_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    base, _ = units(tmp_path)
    before = torch.get_rng_state()
    train_model(base)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_model_is_used_again_and_one_of_other_settings_replaced(tmp_path: Path) -> None:
    base, _ = units(tmp_path)
    weights = Path(train_model(base)) / "model.safetensors"
    first = weights.stat().st_mtime_ns
    demo.write_examples(tmp_path, settings=TINY)
    train_model(base)
    assert weights.stat().st_mtime_ns == first
    train_model(replace(base, seed=base.seed + 1))
    assert weights.stat().st_mtime_ns != first


def test_an_interrupted_training_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = units(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_models, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_model(base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_a_folder_that_the_demo_did_not_make_is_refused(tmp_path: Path) -> None:
    base, _ = units(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="holds something else"):
        train_model(base)
    assert (tmp_path / "base" / "thesis.txt").read_text() == "precious"


def test_the_written_recipe_is_one_that_run_takes(made: Path) -> None:
    sources = [str(made / "sources" / name) for name in demo.QUESTIONS]
    file = demo.write_recipe(made, base=str(made / "base"), sources=sources, settings=TINY)
    recipe = load_recipe(file)
    assert recipe.parameters.k == 0.2
    assert len(recipe.models) == 8
    assert recipe.tune is not None
    assert recipe.tune.model == "svdmerge.demo:build"


def test_importing_the_demo_imports_neither_ray_nor_scikit_learn() -> None:
    program = "import sys, svdmerge.demo; print(sorted({'ray', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_whole_demo_runs_in_this_process_and_again_from_what_is_there(tmp_path: Path) -> None:
    result = demo.run_demo(tmp_path, address="none", settings=TINY)
    base, chosen, bar, *others = result.rows
    assert base.trained == chosen.trained == bar.trained == 0
    assert bar.name.startswith("best source in hindsight: ")
    assert bar.accuracy == max(row.accuracy for row in result.sources) >= chosen.accuracy
    assert any(row.trained > 0 for row in others)
    assert all(0 <= row.accuracy <= 1 for row in (*result.rows, *result.sources))
    assert all(Path(path).exists() for path in result.paths.values())
    assert result.report.status == "done"

    again = demo.run_demo(tmp_path, address="none", settings=TINY)
    assert again.report.status == "unchanged"
    assert [r.accuracy for r in again.rows] == [r.accuracy for r in result.rows]
