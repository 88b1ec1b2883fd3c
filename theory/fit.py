"""Minimisers of the trainer's losses over a few parameters, for many problems at once in float64."""

from collections.abc import Callable

import torch

Objective = Callable[[torch.Tensor], torch.Tensor]  # (problems, k) parameters to (problems,) losses


def newton(objective: Objective, start: torch.Tensor, steps: int = 60) -> torch.Tensor:
    """Minimisers of convex losses that do not change when all parameters shift; (problems, k), each with mean 0.

    Newton's method; a step that does not lower its problem's loss is halved.
    """
    point, k = start.detach(), start.shape[1]
    constant = torch.ones(k, k, dtype=point.dtype) / k  # the direction in which nothing changes
    for _ in range(steps):
        point.requires_grad_()
        loss = objective(point)
        (gradient,) = torch.autograd.grad(loss.sum(), point, create_graph=True)
        rows = [torch.autograd.grad(gradient[:, i].sum(), point, retain_graph=True)[0] for i in range(k)]
        hessian = torch.stack(rows, dim=1)
        scale = hessian.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        step = torch.linalg.solve(hessian + scale * constant, gradient.detach())
        point, length = point.detach(), torch.ones(len(point), 1, dtype=point.dtype)
        for _ in range(30):
            worse = objective(point - length * step) > loss.detach() + 1e-15 * loss.detach().abs()
            if not worse.any():
                break
            length[worse] /= 2
        moved = torch.where(worse[:, None], 0.0, length * step)
        point = point - moved
        if moved.abs().max() < 1e-12:
            break
    return point - point.mean(dim=1, keepdim=True)


def lbfgs(objective: Objective, start: torch.Tensor) -> torch.Tensor:
    """Minimisers of smooth losses of alike curvature, (problems, k): L-BFGS on their sum."""
    point = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([point], max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = objective(point).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return point.detach()
