"""Two more laws of log loss: Kaplan's joint law and Gadre's law of over-training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scaling.chinchilla import FLOPS_PER_PARAMETER_TOKEN, LARGEST, SIZE, TOKENS, labels, positive_loss, runs
from scaling.frame import Source, finished, need, numbers, read
from scaling.lawfit import LawFit, law_fit
from scaling.lse import Terms


def fit_kaplan(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    drop_largest: int = 0,
    draws: int = 1000,
    cluster: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> LawFit:
    """Fit L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (Kaplan et al. 2020, eq. 1.5).

    Options as in `fit_chinchilla`.
    """
    frame, excluded, n, d, loss = runs(source, columns, drop_largest)
    mean_n, mean_d = float(np.log(n).mean()), float(np.log(d).mean())
    x, z = np.log(n) - mean_n, np.log(d) - mean_d
    # phi = (size term, data term, alpha_N / alpha_D, alpha_D)
    terms = np.zeros((2, len(loss), 4))
    terms[0, :, 0] = terms[1, :, 1] = 1.0
    terms[0, :, 2] = -x
    # the data term has no free exponent: it enters the offset of the logits through a fixed column
    fixed = np.zeros((2, len(loss)))
    fixed[1] = -z

    def report(phi: np.ndarray) -> dict[str, np.ndarray]:
        ratio = phi[:, 2]
        return {
            "N_c": np.exp(np.clip(phi[:, 0] / np.where(ratio == 0, 1e-300, ratio) + mean_n, -700, 700)),
            "D_c": np.exp(np.minimum(phi[:, 1] + mean_d, LARGEST)),
            "alpha_N": ratio * phi[:, 3],
            "alpha_D": phi[:, 3],
        }

    def predict(params: Mapping[str, float], at: Mapping[str, np.ndarray]) -> np.ndarray:
        size, tokens = at["total_parameters"], at["tokens"]
        ratio = params["alpha_N"] / params["alpha_D"]
        return ((params["N_c"] / size) ** ratio + params["D_c"] / tokens) ** params["alpha_D"]

    starts = []
    for power in (0.05, 0.1, 0.2, 0.35):
        for ratio in (0.4, 0.8, 1.2, 2.0):
            parts = np.stack([np.exp(-ratio * x), np.exp(-z)], axis=1)
            best = np.linalg.lstsq(parts, loss ** (1 / power), rcond=None)[0]
            best = np.maximum(best, 1e-3 * float(np.abs(best).max()) + 1e-12)
            starts.append([*np.log(best).tolist(), ratio, power])
    return law_fit(
        name="kaplan",
        formula="[(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
        data=Terms(terms=terms, log_loss=np.log(loss), power=3, offset=fixed),
        starts=np.array(starts),
        report=report,
        main=("N_c", "D_c", "alpha_N", "alpha_D"),
        labels=("total_parameters", "tokens"),
        exponents=("alpha_N", "alpha_D"),
        rests_on={"N_c": SIZE, "alpha_N": SIZE, "D_c": TOKENS, "alpha_D": TOKENS},
        predict=predict,
        columns={"total_parameters": n, "tokens": d},
        loss=loss,
        delta=delta,
        draws=draws,
        cluster=labels(frame, cluster),
        confidence=confidence,
        seed=seed,
        excluded=excluded,
        held={"dropped_largest": drop_largest},
    )


def fit_gadre(
    source: Source,
    *,
    columns: Mapping[str, str] | None = None,
    delta: float = 1e-3,
    draws: int = 1000,
    cluster: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> LawFit:
    """Fit L = E + (a M^eta + b M^-eta) C^-eta, M = D / N the token multiplier (Gadre et al. 2024, eq. 4).

    Takes `budget` and `over_training`; either is filled in from `total_parameters` and `tokens` (C = 6 N D)
    where it is missing. It is Chinchilla's law with equal exponents, written for runs that are trained
    beyond the optimum.
    """
    frame = read(source, columns)
    need(frame, "loss")
    direct = {"budget", "over_training"} <= set(frame.columns)
    required = ("budget", "over_training") if direct else ("total_parameters", "tokens")
    frame, excluded = finished(frame, required)
    loss = positive_loss(frame)
    if direct:
        compute, multiplier = numbers(frame, "budget"), numbers(frame, "over_training")
    else:
        size, tokens = numbers(frame, "total_parameters"), numbers(frame, "tokens")
        compute, multiplier = FLOPS_PER_PARAMETER_TOKEN * size * tokens, tokens / size
    mean_c, mean_m = float(np.log(compute).mean()), float(np.log(multiplier).mean())
    c, m = np.log(compute) - mean_c, np.log(multiplier) - mean_m
    terms = np.zeros((3, len(loss), 4))
    terms[0, :, 0] = terms[1, :, 1] = terms[2, :, 2] = 1.0
    terms[0, :, 3], terms[1, :, 3] = m - c, -m - c

    def report(phi: np.ndarray) -> dict[str, np.ndarray]:
        eta = phi[:, 3]
        best = (phi[:, 1] - phi[:, 0]) / (2 * np.where(eta == 0, 1e-300, eta)) + mean_m
        return {
            "a": np.exp(np.minimum(phi[:, 0] + eta * (mean_c - mean_m), LARGEST)),
            "b": np.exp(np.minimum(phi[:, 1] + eta * (mean_c + mean_m), LARGEST)),
            "E": np.exp(phi[:, 2]),
            "eta": eta,
            "best_multiplier": np.exp(np.clip(best, -LARGEST, LARGEST)),
        }

    def predict(params: Mapping[str, float], at: Mapping[str, np.ndarray]) -> np.ndarray:
        eta, ratio = params["eta"], at["over_training"]
        return params["E"] + (params["a"] * ratio**eta + params["b"] * ratio**-eta) * at["budget"] ** -eta

    starts = []
    for eta in (0.05, 0.1, 0.17, 0.25, 0.4, 0.6):
        parts = (
            np.stack([np.exp(eta * (m - c)), np.exp(-eta * (m + c)), np.ones_like(c)], axis=1) / loss[:, None]
        )
        best = np.maximum(np.linalg.lstsq(parts, np.ones_like(c), rcond=None)[0], 1e-3 * float(loss.min()))
        starts.append([*np.log(best).tolist(), eta])
    return law_fit(
        name="gadre",
        formula="E + (a M^eta + b M^-eta) C^-eta",
        data=Terms(terms=terms, log_loss=np.log(loss)),
        starts=np.array(starts),
        report=report,
        main=("a", "b", "E", "eta"),
        labels=("models too small", "models trained too little"),
        exponents=("eta",),
        rests_on={},
        predict=predict,
        columns={"budget": compute, "over_training": multiplier},
        loss=loss,
        delta=delta,
        draws=draws,
        cluster=labels(frame, cluster),
        confidence=confidence,
        seed=seed,
        excluded=excluded,
        held={"C and M": "columns" if direct else "6 N D and D / N"},
    )
