"""PA-EDSR, plain: EDSR with the pyramid attention of PANet."""

from __future__ import annotations

from torch import Tensor

from fullres.networks.pa_edsr import PAEDSR
from plain import panet


def network(self: PAEDSR, image: Tensor) -> Tensor:
    x = self.head(self.sub_mean(image))
    x = self.tail(self.body(x) + x)
    return self.add_mean(x)


FORMS = {**panet.PARTS, PAEDSR: network}
