"""The convergence measurement: the lower level is solved, and both levels' gradients are what the figure draws."""

import torch

from benchmarks import convergence
from seqlora_core.calibration import calibrate
from seqlora_core.demo_model import SIZE


def test_a_quadratic_is_solved():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, target = root @ root.mT + torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    left = convergence.solve(lambda: x @ hessian @ x / 2 - target @ x, [x], 100)
    assert left < 1e-6 and torch.allclose(x.detach(), torch.linalg.solve(hessian, target), atol=1e-6)


def test_steps_of_the_basis_on_the_demo_model(model, tmp_path):
    calibration = calibrate(model, (SIZE, SIZE), 8)
    curves = {how: convergence.run(model, calibration, how, steps=2, batch=2, first=4, later=2) for how in ("none", "cg:1")}
    for norms, values, unsolved in curves.values():
        assert len(norms) == len(values) == len(unsolved) == 2 and min(norms) > 0 and min(unsolved) > 0
    # lora_up is where it was: only how it follows the basis differs
    assert curves["none"][1][0] == curves["cg:1"][1][0] and curves["none"][0][0] != curves["cg:1"][0][0]
    norms, values = ({how: found[i] for how, found in curves.items()} for i in (0, 1))
    convergence.figure(norms, values, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
