"""Designs and updates of a known scale and tail."""

from __future__ import annotations

from poe_models import AbsolutePrecision, Anchor, Energy, Identity, ProductOfExperts, ResidualMap, Scale

ETA = 0.5


def design(names: list[str], energy: Energy, scale: Scale, residual_map: ResidualMap | None = None) -> ProductOfExperts:
    anchor = Anchor(precision=AbsolutePrecision(ETA))
    return ProductOfExperts.of(names, residual_map or Identity(), energy, scale, anchor=anchor)
