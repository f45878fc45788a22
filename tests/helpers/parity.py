"""Measures this library against recordings of the reference implementation and against FrEIA 0.2.

``python -m tests.helpers.parity`` prints the README's tables; the tests assert the same numbers.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from FrEIA.framework import SequenceINN
from torch import Tensor, nn

from benchmarks.peers.freia import freia_flow
from fastmsflow.compat import load_official, save_official
from fastmsflow.compat.state_dict_keys import fusion_key, parallel_key
from fastmsflow.models.msflow import MultiScaleFlow
from fastmsflow.nn.feature_pooling import pool_features
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from fastmsflow.scoring import anomaly_scores
from tests.helpers.ops_parity import DEVICE
from tests.helpers.paths import GOLDEN
from tests.helpers.tolerances import ON_A_GPU

NAMES = ("tiny", "odd")


def allowed(bound: float) -> float:
    """``bound``, one of float32, on the device of the tests."""
    return bound * ON_A_GPU if DEVICE != "cpu" else bound


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    ours = ours.to(theirs.device)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def recording(name: str) -> dict:
    return torch.load(GOLDEN / f"{name}_expected.pt", weights_only=True)


def golden_flow(name: str, dtype: torch.dtype) -> MultiScaleFlow:
    flow = load_official(GOLDEN / f"{name}.pt", clamp=recording(name)["config"]["clamp_alpha"])
    return flow.to(DEVICE, dtype)


def golden_inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    return [level.to(DEVICE, dtype) for level in recording(name)["pooled"]]


def golden_errors(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error of every recorded quantity but gradients and trajectory."""
    expected = recording(name)
    flow = golden_flow(name, dtype)
    pooled = pool_features([level.to(DEVICE, dtype) for level in expected["features"]], "avg")
    with torch.no_grad():
        parallel = [
            level_flow(x, code(x))
            for level_flow, code, x in zip(flow.parallel_flows, flow.position_codes, pooled, strict=True)
        ]
        z, log_det = flow(pooled)
        nll = flow.nll(pooled)
        score, add, mul = anomaly_scores(z, tuple(expected["config"]["input_size"]), expected["config"]["top_k"])
    worst = lambda ours, theirs: max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))  # noqa: E731
    return {
        "pooled": worst(pooled, expected["pooled"]),
        "parallel z": worst([z for z, _ in parallel], [p["z"] for p in expected["parallel"]]),
        # A level's log-det can nearly cancel to 0, so its error is counted per element of the level, in nats.
        "parallel log-det, nats an element": max(
            (ours.cpu() - theirs["logdet"]).abs().max().item() / x[0].numel()
            for (_, ours), theirs, x in zip(parallel, expected["parallel"], pooled, strict=True)
        ),
        "z": worst(z, expected["z"]),
        "log-det": relative_error(log_det, expected["logdet"]),
        "nll": relative_error(nll, expected["nll"]),
        "logp": worst([-0.5 * level.square().mean(dim=1) for level in z], expected["logp"]),
        "anomaly score": relative_error(score, expected["anomaly_score"]),
        "additive map": relative_error(add, expected["score_map_add"]),
        "multiplicative map": relative_error(mul, expected["score_map_mul"]),
    }


def golden_gradients(name: str, dtype: torch.dtype) -> dict[str, float]:
    """The relative error of every recorded gradient of nll.mean(), by the checkpoint's key."""
    flow = golden_flow(name, dtype)
    flow.nll(golden_inputs(name, dtype)).mean().backward()
    ours: dict[str, Tensor] = {}
    for level, parallel in enumerate(flow.parallel_flows):
        ours |= {f"parallel_flows.{level}.{parallel_key(k)}": p.grad for k, p in parallel.named_parameters()}
    ours |= {f"fusion_flow.{fusion_key(k, 3)}": p.grad for k, p in flow.fusion_flow.named_parameters()}
    expected = recording(name)["grads"]
    assert ours.keys() == expected.keys()
    return {key: relative_error(ours[key].reshape(theirs.shape), theirs) for key, theirs in expected.items()}


def golden_trajectory(name: str, dtype: torch.dtype) -> Iterator[tuple[float, float]]:
    """Per Adam step: the error of the loss relative to the first loss, and that of the gradient norm."""
    expected = recording(name)
    flow, inputs = golden_flow(name, dtype).train(), golden_inputs(name, dtype)
    optimizer = torch.optim.Adam(flow.parameters(), lr=expected["config"]["lr"])
    first = abs(expected["trajectory"][0][0])
    for loss, norm in expected["trajectory"]:
        optimizer.zero_grad()
        ours = flow.nll(inputs).mean()
        ours.backward()
        our_norm = nn.utils.clip_grad_norm_(flow.parameters(), expected["config"]["clip"])
        optimizer.step()
        yield abs(ours.item() - loss) / first, abs(our_norm.item() - norm) / norm


def freia_pairs(path: Path, dtype: torch.dtype) -> Iterator[tuple[int, SequenceINN, MultiScaleFlow, Tensor, Tensor]]:
    """(level, FrEIA's flow, ours, input, condition) from the same weights, which went through ``path``."""
    torch.manual_seed(0)
    channels, conditions, blocks, grids = (24, 40, 112), (16, 32, 64), (2, 5, 8), ((12, 20), (6, 10), (3, 5))
    ours = MultiScaleFlow(channels, conditions, blocks)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if "global" in key or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_official(ours, path)
    states = torch.load(path, weights_only=True)["parallel_flows"]
    ours = ours.to(DEVICE, dtype).eval()
    for level, grid in enumerate(grids):
        theirs = freia_flow(channels[level], conditions[level], blocks[level], grid)
        theirs.load_state_dict(states[level])
        x = torch.randn(3, channels[level], *grid, dtype=dtype).to(DEVICE)
        encoding = positional_encoding_2d(conditions[level], *grid, dtype=dtype, device=DEVICE)
        yield level, theirs.to(DEVICE, dtype), ours, x, encoding


def freia_errors(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """The largest relative error over three levels of 2, 5, 8 blocks, forward and inverse."""
    errors = dict.fromkeys(("z", "log-det", "inverse x", "inverse log-det"), 0.0)
    with torch.no_grad():
        for level, theirs, ours, x, condition in freia_pairs(path, dtype):
            flow, wide = ours.parallel_flows[level], condition.expand(len(x), -1, -1, -1)
            for name, ours_out, theirs_out in (
                ("", flow(x, condition), theirs(x, c=[wide])),
                ("inverse ", flow.inverse(x, condition), theirs(x, c=[wide], rev=True)),
            ):
                for i, what in enumerate(("x" if name else "z", "log-det")):
                    key = name + what
                    errors[key] = max(errors[key], relative_error(ours_out[i], theirs_out[i]))
    return errors


def main() -> None:
    import tempfile

    dtypes = (torch.float32, torch.float64)
    columns = [(name, dtype) for name in NAMES for dtype in dtypes]
    print("| largest relative error | " + " | ".join(f"{n}, {str(d)[6:]}" for n, d in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    rows: dict[str, list[float]] = {}
    for name, dtype in columns:
        errors = golden_errors(name, dtype)
        gradients = golden_gradients(name, dtype)
        steps = list(golden_trajectory(name, dtype))
        errors[f"every gradient ({', '.join(str(len(recording(n)['grads'])) for n in NAMES)})"] = max(
            gradients.values()
        )
        errors["loss trajectory (10, 5 steps)*"] = max(loss for loss, _ in steps)
        errors["gradient norm trajectory"] = max(norm for _, norm in steps)
        for key, value in errors.items():
            rows.setdefault(key, []).append(value)
    for key, values in rows.items():
        print(f"| {key} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
    print("\n| ours against FrEIA 0.2 | z | log-det | inverse x | inverse log-det |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            errors = freia_errors(Path(folder) / "shared.pt", dtype)
            print(f"| {str(dtype)[6:]} | " + " | ".join(f"{value:.1e}" for value in errors.values()) + " |")


if __name__ == "__main__":
    main()
