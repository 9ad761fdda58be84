"""The bytes of parts that wait: there for their own work, once."""

from types import SimpleNamespace

import torch

from agsm_rl.doctor.memory.waiting import let_wait


def test_an_autoencoder_that_stays_for_two_backward_passes_is_counted_once() -> None:
    backbone = SimpleNamespace(decode=lambda latents: 2 * latents, encode_images=lambda images: images)
    rehearsal = SimpleNamespace(now=100, phase="learning", touch=lambda: None)
    let_wait(backbone, {"vae": 30}, rehearsal)
    counted = [rehearsal.now]
    for requires_grad in (True, True, False, False):
        backbone.decode(torch.ones(1, requires_grad=requires_grad))
        counted.append(rehearsal.now)
    assert counted == [70, 100, 100, 70, 70]
