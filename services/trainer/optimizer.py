"""Muon for matrices (Jordan et al. 2024), AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients of Muon's reference implementation: fast to about-orthogonal, not exact.
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised. In float32 (torch.optim.Muon's bfloat16 runs 30 times slower on
    CPUs without AVX-512), and over all matrices of one shape at once.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                updates = torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in parameters])
                rows, columns = updates.shape[1:]
                updates = orthogonalised(updates, group["steps"]) * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """[n, rows, columns] → about U V^T of each one's singular value decomposition."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


def make_optimizers(modules: Iterable[nn.Module], matrices_lr: float, others_lr: float) -> list[torch.optim.Optimizer]:
    """What turns one hidden space into another goes to Muon (if its rate is not zero), all else to AdamW.

    A patch embedding is such a matrix, of its flattened kernel. Under AdamW its gradient is mostly brightness, and the
    fine detail that tells a scratch from a stain is learnt last.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for module in modules:
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hidden = matrices_lr > 0 and parameter.ndim >= 2 and id(parameter) not in tables
                (matrices if hidden and "lm_head" not in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=others_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=matrices_lr), adam] if matrices else [adam]
