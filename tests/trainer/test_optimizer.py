"""Muon and who gets it."""

import pytest
import torch
from torch import nn

from services.trainer.optimizer import Muon, make_optimizers, orthogonalised


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_updates_come_out_about_orthogonal(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(1)), 5))
    assert values.min() > 0.4
    assert values.max() < 1.3


def test_matrices_of_one_shape_are_updated_as_each_alone_would_be() -> None:
    torch.manual_seed(0)
    pair = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    alone = nn.Parameter(pair[1].detach().clone())
    for parameter in (*pair, alone):
        parameter.grad = torch.ones_like(parameter) + parameter.detach()
    Muon(pair, lr=0.1).step()
    Muon([alone], lr=0.1).step()
    assert torch.allclose(pair[1], alone, atol=1e-5)


def test_a_kernel_is_updated_as_the_matrix_it_flattens_to() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 2, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad, matrix.grad = kernel.detach().clone(), matrix.detach().clone()
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.allclose(kernel.detach().flatten(1), matrix, atol=1e-5)


def test_tables_and_vectors_do_not_go_to_muon() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "conv": nn.Conv2d(1, 1, 2)})
    muon, adam = make_optimizers([model], 0.1, 0.1)
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4), (1, 1, 2, 2)]
    assert [p.shape for p in adam.param_groups[0]["params"]] == [(5, 4), (4,), (1,)]
