"""Settlements of the demo landscape: where towns, villages and gravel pits lie, and what stands in them."""

import math

import numpy as np

from preprocess import demo_materials as m
from preprocess.demo_noise import cell, chance, fractal, jit, mix, smoothstep, unit

MAP_EPOCH, IMAGE_EPOCH = 0, 1
TOWN, VILLAGE, PIT = range(3)
# metres between places of a kind, smallest and largest radius in metres, share of the places taken,
# how much smaller it was at the map's epoch, as a share of its radius
_KINDS = np.array(
    [
        (8000.0, 600.0, 2200.0, 0.70, 0.05),
        (2600.0, 150.0, 450.0, 0.60, 0.05),
        (5600.0, 110.0, 420.0, 0.45, 0.15),
    ]
)
_PLACE, _STREET, _LOT = 500, 600, 620


@jit
def place_at(key, x, y, epoch):
    """(kind, depth, id) of the place people made at a point: depth is 1 at its middle, 0 at its rim; or kind -1.

    Places stand on jittered lattices, one a cell at most, small ones more frequent.
    """
    for kind in range(_KINDS.shape[0]):
        size, low, high, share, growth = _KINDS[kind]
        salt = _PLACE + 20 * kind
        j = math.floor(y / size)
        slid = x + size * chance(key, salt + 1, j, 0)  # rows slip against one another, or the lattice would show
        i = math.floor(slid / size)
        h = mix(key, salt, i, j)
        if unit(h) >= share:
            continue
        dx = (i + 0.3 + 0.4 * unit(mix(h, salt, 1, 0))) * size - slid
        dy = (j + 0.3 + 0.4 * unit(mix(h, salt, 2, 0))) * size - y
        squeeze = 0.7 + 0.6 * unit(mix(h, salt, 3, 0))
        grade = unit(mix(h, salt, 4, 0))
        radius = low + (high - low) * grade * grade
        depth = 1.0 - math.sqrt(dx * dx * squeeze + dy * dy / squeeze) / radius
        if depth < -0.8:
            continue
        depth += 0.6 * fractal(key, salt + 2, x / radius, y / radius, 4)
        if epoch == MAP_EPOCH:
            depth -= growth
        if depth > 0.0:
            return kind, depth, h
    return -1, -1.0, key


@jit
def dug(depth, spot):
    """(material, second material, its share) in a gravel pit: bare ground around a pond."""
    if depth > 0.55:
        return m.SHALLOW_WATER, m.QUARRY, 0.1
    return m.QUARRY, m.GRAVEL, min(1.0, max(0.0, 0.5 + spot))


@jit
def _hall(h, fu, fv):
    r = unit(h)
    if r < 0.75 and fu < 0.38 and fv < 0.38:
        roof = m.WHITE_ROOF if r < 0.15 else (m.GREY_ROOF if r < 0.5 else m.CONCRETE)
        return roof, m.ASPHALT, 0.25 * unit(mix(h, _LOT, 3, 0))
    return (m.ASPHALT, m.CONCRETE, 0.6 * r) if r < 0.88 else (m.GARDEN, m.PASTURE, 0.3)


@jit
def _home(h, fu, fv, depth):
    r = unit(h)
    dense = 0.30 + 0.45 * smoothstep(0.15, 0.9, depth)
    half = 0.5 * math.sqrt(dense)
    if r > 0.12 and fu < half and fv < half:
        return (m.RED_ROOF if r < 0.62 else m.GREY_ROOF), m.GARDEN, 0.55 - 0.4 * dense
    return m.GARDEN, m.BROADLEAF if r < 0.5 else m.ASPHALT, 0.5 * unit(mix(h, _LOT, 2, 2)) * (1.1 - 0.6 * dense)


@jit
def built(kind, town, x, y, depth, bend, sweep, patch):
    """(material, second material, its share, tone) in a settlement: streets, lots with a house, halls, parks.

    bend: metres by which streets curve. sweep, patch: noises that lay out industry and parks.
    """
    i, j, avenue = cell(town, _STREET, x / 850.0, y / 850.0)
    if kind == VILLAGE:
        i, j, avenue = 0, 0, 1.0
    quarter = mix(town, _STREET + 1, i, j)
    if avenue * 850.0 < 9.0:
        return m.ASPHALT, m.BROADLEAF, 0.2, 1.0
    turn = math.pi * unit(quarter)
    c, s = math.cos(turn), math.sin(turn)
    u, v = c * x + s * y + 2.0 * bend, c * y - s * x - 2.0 * bend
    industry = kind == TOWN and depth < 0.7 and sweep > 0.34
    grade = unit(mix(quarter, _STREET, 1, 1))
    long, short = (260.0, 170.0) if industry else (120.0 + 110.0 * grade, 85.0 + 40.0 * grade)
    row = math.floor(v / short)
    u += long * chance(quarter, _STREET, row, 0)  # cross streets don't run through
    block = math.floor(u / long)
    du, dv = u - block * long, v - row * short
    street = min(min(du, long - du), min(dv, short - dv))
    if street < 6.0:
        return m.ASPHALT, m.GARDEN, min(0.8, 0.25 + street / 12.0), 1.0
    if patch > 0.5 and not industry:
        return (m.MEADOW if patch < 0.6 else m.BROADLEAF), m.GARDEN, 0.35, 1.0
    lots_u = 2.0 if industry else math.floor(long / 27.0)
    lot_u, lot_v = du / long * lots_u, dv / short * (2.0 if industry else 3.0)
    a, b = math.floor(lot_u), math.floor(lot_v)
    h = mix(quarter, _LOT, block * 16 + a, row * 8 + b)
    fu, fv = abs(lot_u - a - 0.5), abs(lot_v - b - 0.5)
    material, second, share = _hall(h, fu, fv) if industry else _home(h, fu, fv, depth)
    return material, second, share, 0.78 + 0.44 * unit(mix(h, _LOT, 1, 1))
