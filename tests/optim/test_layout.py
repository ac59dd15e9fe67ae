"""Which tensors are runs of memory, and which of them lie alike."""

from __future__ import annotations

import torch

from barlow.optim.layout import dense, laid_out_as, same_layout


def test_dense_is_every_element_once_without_holes() -> None:
    x = torch.zeros(4, 6, 3, 3)
    for tensor in (x, x.to(memory_format=torch.channels_last), x.permute(2, 0, 3, 1), x[1:3], torch.zeros(()), x[:0]):
        assert dense(tensor)
    for tensor in (x[:, ::2], x[..., :2], torch.zeros(1).expand(5), torch.zeros(9).as_strided((3, 3), (2, 2))):
        assert not dense(tensor)


def test_a_dimension_of_one_element_has_no_stride_that_counts() -> None:
    assert same_layout((7, 4, 1, 1), (4, 1, 1, 1), (4, 1, 4, 4))
    assert not same_layout((7, 4), (4, 1), (1, 7))
    assert same_layout((0, 4), (4, 1), (1, 1))


def test_a_copy_only_where_the_layout_differs() -> None:
    p = torch.rand(5, 4, 3, 2).to(memory_format=torch.channels_last)
    alike, other = torch.rand(5, 4, 3, 2).to(memory_format=torch.channels_last), torch.rand(5, 4, 3, 2)
    assert laid_out_as(p, alike) is alike
    made = laid_out_as(p, other)
    assert made.stride() == p.stride()
    assert torch.equal(made, other)
