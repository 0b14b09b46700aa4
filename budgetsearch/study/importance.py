"""How much each parameter mattered for being among the best."""

from __future__ import annotations

from collections.abc import Sequence

from budgetsearch.core.records import Params
from budgetsearch.core.space import Space
from budgetsearch.study.distributions import quiet, shown

GOOD_TRIALS = 5
"""So many trials count as the best, at the least: its documentation asks for them, to be steady."""
GOOD_SHARE = 0.1
"""... or this share of them, where that is more."""


def importances(space: Space, results: Sequence[tuple[Params, float]]) -> dict[str, float]:
    """Each searched parameter's share, the largest first; together 1.

    PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255): how far the best trials' values of a parameter lie
    from those of all trials. ``results`` are configurations with their losses, all at the same rung.
    """
    import optuna

    with quiet():
        study = optuna.create_study(direction="minimize")
        for params, loss in results:
            distributions = shown(space, params)
            known = {name: params[name] for name in distributions}
            study.add_trial(optuna.trial.create_trial(params=known, distributions=distributions, value=loss))
        good = max(GOOD_SHARE, min(1.0, GOOD_TRIALS / len(results)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=good)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}
