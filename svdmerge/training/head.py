"""The linear head that a frozen model gets: in closed form, or logistic regression if that does
better on examples held out."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svdmerge.core.discriminant import DiscriminantFit
from svdmerge.core.transfer import LinearHead

# Three, so that four examples a class leave two or three to learn from.
FOLDS = 3
# Inverse penalties tried on standardised features, from class means compared to nearly none.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
# Iterations of L-BFGS: the strongest of these converges in fewer, and a head that has not quite is
# judged by what it does.
MAX_ITERATIONS = 200
# Examples up to which both are tried. Thirteen regressions of more take minutes, and with so many
# the two heads agree.
MAX_EXAMPLES = 16384


def fitted_head(
    features: Float[Tensor, "b d"], *, labels: Int[Tensor, " b"], closed: DiscriminantFit
) -> LinearHead:
    """The closed-form head, or logistic regression where its cross-validated accuracy is above the
    other's by leave-one-out; in float64.

    With many classes, one covariance for all and class means of eight examples fall short of it by
    about three points (77 and 150 classes); with few the closed form is as good or better.
    """
    # Here, not above: importing scikit-learn takes a second, and few commands fit a head.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = torch.bincount(labels.long())
    if int(counts.min()) < FOLDS or len(labels) > MAX_EXAMPLES:
        return closed.head
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
        {"logisticregression__C": list(STRENGTHS)},
        cv=StratifiedKFold(FOLDS),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(features.double().numpy(), labels.numpy())
    left_out = float((closed.left_out.argmax(dim=1) == labels).double().mean())
    if float(search.best_score_) <= left_out:
        return closed.head
    scaler, regression = (step for _, step in search.best_estimator_.steps)
    weight = torch.from_numpy(regression.coef_ / scaler.scale_)
    bias = torch.from_numpy(regression.intercept_) - weight @ torch.from_numpy(scaler.mean_)
    if len(counts) == 2:
        # scikit-learn keeps the second class's odds alone.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LinearHead(weight=weight, bias=bias)
