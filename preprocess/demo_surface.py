"""What covers the ground at a point of the demo landscape: fields, woods, heights, waters, roads and towns.

A handful of noises is made once for a point and used by whatever lies there: ``fine`` (24 m: crowns, swaths),
``rough`` (60 m), ``spot`` (130 m) and ``patch`` (450 m and finer). Every cover is a mixture of two materials:
(material, second material, share of the second, tone), the tone a factor on brightness.
"""

import math

from preprocess import demo_backdrop as slow
from preprocess import demo_materials as m
from preprocess.demo_backdrop import sample
from preprocess.demo_noise import cell, chance, fractal, jit, mix, noise, ridges, smoothstep, unit
from preprocess.demo_town import IMAGE_EPOCH, MAP_EPOCH, PIT, built, dug, place_at

_FINE, _ROUGH, _SPOT, _PATCH, _RIDGE, _STRATA = range(700, 820, 20)
_DISTRICT, _PARCEL, _CROP, _CHANGE, _STAND = range(820, 920, 20)
DISTRICT_M = 1900.0


@jit
def _share(value):
    return min(1.0, max(0.0, value))


@jit
def _crop(h, season):
    """The crop of a parcel, in the state its season has brought it to (0: June, 1: September)."""
    kind = unit(mix(h, _CROP, 1, 0))
    late = season + 0.4 * (unit(mix(h, _CROP, 2, 0)) - 0.5)
    if kind < 0.36:  # cereals
        if late < 0.5:
            return m.GREEN_CEREAL if late < 0.25 else m.RIPE_CEREAL
        return m.STUBBLE if late < 0.85 or kind < 0.18 else m.SOIL
    if kind < 0.62:
        return m.MAIZE if late > 0.05 else m.SOIL
    if kind < 0.72:
        return m.BEET
    if kind < 0.80:
        return m.RAPE if late < 0.4 else m.STUBBLE
    if kind < 0.92:
        return m.GREEN_CEREAL
    return m.SOIL if kind < 0.97 else m.DARK_SOIL


@jit
def _sown(h, u, side, grass_share, season, epoch, fine, patch):
    """A parcel's crop or meadow with tramlines, patchy soil and a grassy balk along its sides."""
    grass = unit(mix(h, _CROP, 0, 0)) < grass_share
    if epoch == MAP_EPOCH and unit(mix(h, _CHANGE, 0, 0)) < 0.05:
        grass = not grass
    kind = unit(mix(h, _CROP, 3, 0))
    meadow = m.MEADOW if kind < 0.5 else (m.PASTURE if kind < 0.8 else m.MOWN_MEADOW)
    material = meadow if grass else _crop(h, season)
    period = 21.0 + 17.0 * unit(mix(h, _CROP, 5, 0))
    rows = (0.015 if grass else 0.05) * math.sin(2.0 * math.pi * u / period)
    tone = 0.88 + 0.24 * unit(mix(h, _CROP, 6, 0)) + 0.12 * patch + rows + 0.08 * fine
    if side < 5.0:
        return m.PASTURE, material, min(1.0, 0.35 + side / 5.0), tone
    gaps = 0.02 + 0.30 * unit(mix(h, _CROP, 7, 0)) ** 2 + 0.22 * max(0.0, patch)
    return material, m.PASTURE if material == m.SOIL else m.SOIL, min(0.45, gaps), tone


@jit
def _wood(key, x, y, broad, young_share, epoch, fine, rough):
    """Trees: stands of differing age and kind, which are cut and planted between the epochs."""
    i, j, _ = cell(key, _STAND, x / 430.0, y / 430.0)
    stand = mix(key, _STAND + 1, i, j)
    age = unit(stand)
    tone = 1.0 + 0.28 * fine + 0.16 * rough
    if age < young_share and epoch == IMAGE_EPOCH:
        return m.CLEARING, m.SOIL, 0.5 * unit(mix(stand, _STAND, 1, 0)), 0.5 + 0.5 * tone
    if age > 1.0 - 2.0 * young_share:
        return m.YOUNG_WOOD, m.CLEARING, 0.2, 0.3 + 0.7 * tone
    share = 0.35 + 1.3 * broad + 0.5 * (unit(mix(stand, _STAND, 2, 0)) - 0.5) + 0.5 * rough
    return m.CONIFER, m.BROADLEAF, _share(share), tone * (0.86 + 0.28 * unit(mix(stand, _STAND, 3, 0)))


@jit
def _heights(key, x, y, height, wood, broad, sweep, epoch, fine, rough, spot, patch):
    """The mountains, by height: wood, pasture, shrub, grass, rock, a little snow."""
    above = height + 150.0 * sweep + 200.0 * patch - 1080.0
    tone = 1.0 + 0.25 * fine
    if above < 0.0:
        if wood + 0.15 * spot < -0.22:
            return m.PASTURE, m.ALPINE_GRASS, 0.4, 0.7 + 0.3 * tone
        return _wood(key, x, y, broad - 0.25, 0.03, epoch, fine, rough)
    if above < 130.0:
        return m.SHRUBS, m.ALPINE_GRASS, 0.3, tone
    bare = (above - 260.0) / 260.0 + 0.8 * spot
    if bare < 0.5:
        return m.ALPINE_GRASS, m.SCREE, min(0.45, max(0.0, 0.8 * bare)), tone
    if above > 700.0 and sweep + 0.5 * patch > 0.75:
        return m.SNOWFIELD, m.ROCK, _share(0.3 + 0.6 * spot), 1.0
    tone += 0.16 * noise(key, _STRATA, x / 700.0, height / 45.0)
    return m.ROCK, m.SCREE, _share(0.5 + spot), tone


@jit
def _parcel(district, x, y, bend):
    """(id, across, metres to a side, metres to an end, middle x, middle y) of the strip a point lies in."""
    turn = math.pi * unit(district)
    c, s = math.cos(turn), math.sin(turn)
    u, v = c * x + s * y + bend, c * y - s * x + bend
    grain = unit(mix(district, _PARCEL, 2, 0))
    long = 260.0 + 420.0 * unit(mix(district, _PARCEL, 1, 0))
    wide = 65.0 + 250.0 * grain * grain
    row, column = math.floor(v / long), math.floor(u / wide)
    start = (column + 0.6 * chance(district, _PARCEL + 1, column, row)) * wide
    if u < start:
        column -= 1
        start = (column + 0.6 * chance(district, _PARCEL + 1, column, row)) * wide
    end = (column + 1.0 + 0.6 * chance(district, _PARCEL + 1, column + 1, row)) * wide
    du, dv = u - 0.5 * (start + end), v - (row + 0.5) * long
    h = mix(district, _PARCEL + 2, column, row)
    return h, u, min(u - start, end - u), 0.5 * long - abs(dv), x - (c * du - s * dv), y - (s * du + c * dv)


@jit
def _farmland(key, fields, west, south, x, y, upland, season, epoch, fine, rough, spot, patch):
    """Fields: strips that share a direction within a district, some of them wood or meadow; roads between."""
    wx = x + sample(fields, west, south, slow.WARP_X, x, y)
    wy = y + sample(fields, west, south, slow.WARP_Y, x, y)
    i, j, border = cell(key, _DISTRICT, wx / DISTRICT_M, wy / DISTRICT_M)
    border *= DISTRICT_M
    if border < 9.0:
        return m.ASPHALT, m.MEADOW, min(1.0, 0.1 + border / 10.0), 1.0
    district = mix(key, _DISTRICT + 1, i, j)
    h, u, side, head, mx, my = _parcel(district, x, y, sample(fields, west, south, slow.BEND, x, y))
    # woods end at parcel borders on the plain, and run freely uphill
    free = smoothstep(0.08, 0.3, upland)
    wood = sample(fields, west, south, slow.WOOD, mx + free * (x - mx), my + free * (y - my))
    if wood + 0.9 * upland + 0.12 * free * spot > 0.27:
        return _wood(key, x, y, sample(fields, west, south, slow.BROAD, x, y), 0.035, epoch, fine, rough)
    if head < 9.0:
        return m.TRACK, m.MEADOW, min(1.0, head / 9.0), 1.0
    if side < 7.0 and spot > 0.05 and unit(mix(district, _PARCEL, 3, 0)) < 0.35:
        return m.BROADLEAF, m.MEADOW, 0.3, 0.9
    grass_share = 0.12 + 0.9 * upland + 0.5 * max(0.0, sample(fields, west, south, slow.MOIST, x, y))
    return _sown(h, u, side, grass_share, season, epoch, fine, patch)


@jit
def _marsh(fine, patch):
    """A moor: sedge, reed, willows, pools."""
    tone = 1.0 + 0.2 * fine
    if patch > 0.55:
        return m.SHALLOW_WATER, m.REED, 0.35, 1.0
    if patch < -0.42:
        return m.SHRUBS, m.BROADLEAF, 0.5, tone
    return m.MOOR, m.REED, _share(0.55 + 1.2 * patch), tone


@jit
def _waters(fields, west, south, x, y, upland, sweep, spot):
    """Lakes, rivers, brooks and what grows along them; share -1 where there is none of that."""
    lake = sample(fields, west, south, slow.LAKE, x, y)
    if lake > 0.0:
        return m.DEEP_WATER, m.SHALLOW_WATER, max(0.0, 1.0 - lake / 0.15)
    bank = abs(sample(fields, west, south, slow.RIVER, x, y)) - 45.0 - 20.0 * sweep
    if bank < 5.0:
        return m.RIVER_WATER, m.GRAVEL, _share((bank + 5.0) / 10.0)
    if bank < 55.0 * sweep + 30.0 * spot - 10.0:
        return m.GRAVEL, m.PASTURE, 0.15
    if bank < 50.0 - 520.0 * sweep:
        return m.BROADLEAF, m.SHRUBS, 0.3
    if lake > -0.25 and sweep > 0.0:
        return m.REED, m.MOOR, _share(0.4 + spot)
    brook = abs(sample(fields, west, south, slow.BROOK, x, y)) + 400.0 * smoothstep(0.05, 0.3, upland)
    if brook < 6.0:
        return m.RIVER_WATER, m.BROADLEAF, 0.5
    if brook < 14.0 + 60.0 * spot:
        return m.BROADLEAF, m.MEADOW, 0.2
    return m.MEADOW, m.MEADOW, -1.0


@jit
def _made(key, fields, west, south, x, y, upland, epoch, sweep, spot, patch):
    """What people built: motorway, settlements, pits; share -1 where they built nothing."""
    lane = abs(sample(fields, west, south, slow.MOTORWAY, x, y))
    if lane < 20.0:
        return m.ASPHALT, m.MEADOW, 0.6 if lane < 3.0 else _share((lane - 13.0) / 7.0), 1.0
    wet = sample(fields, west, south, slow.LAKE, x, y) > -0.05
    if upland > 0.22 or wet or abs(sample(fields, west, south, slow.RIVER, x, y)) < 75.0:
        return m.MEADOW, m.MEADOW, -1.0, 1.0
    kind, depth, town = place_at(key, x, y, epoch)
    if kind < 0:
        return m.MEADOW, m.MEADOW, -1.0, 1.0
    if kind == PIT:
        material, second, share = dug(depth, spot)
        return material, second, share, 1.0
    return built(kind, town, x, y, depth, sample(fields, west, south, slow.BEND, x, y), sweep, patch)


@jit
def _height(key, fields, west, south, x, y, upland):
    height = sample(fields, west, south, slow.HILLS, x, y)
    if upland > 0.0:
        wx = x + sample(fields, west, south, slow.FOLD_X, x, y)
        wy = y + sample(fields, west, south, slow.FOLD_Y, x, y)
        crest = ridges(key, _RIDGE, wx / 7600.0, wy / 7600.0, 9)
        height += upland * (120.0 + 1350.0 * upland * crest)
    return height


@jit
def surface(key, fields, west, south, x, y, season, epoch):
    """(material, second material, its share, tone, height in metres) of the ground at a point.

    fields, west, south: of the Backdrop. season: 0 June to 1 September. epoch: MAP_EPOCH or IMAGE_EPOCH.
    """
    upland = sample(fields, west, south, slow.UPLAND, x, y)
    sweep = sample(fields, west, south, slow.SWEEP, x, y)
    height = _height(key, fields, west, south, x, y, upland)
    fine = noise(key, _FINE, x / 24.0, y / 24.0)
    rough = noise(key, _ROUGH, x / 60.0, y / 60.0)
    spot = noise(key, _SPOT, x / 130.0, y / 130.0)
    patch = fractal(key, _PATCH, x / 450.0, y / 450.0, 4)
    grain = 1.0 + 0.06 * fine
    if upland < 0.5:
        one, two, share, tone = _made(key, fields, west, south, x, y, upland, epoch, sweep, spot, patch)
        if share >= 0.0:
            return one, two, share, tone * grain, height
    one, two, share = _waters(fields, west, south, x, y, upland, sweep, spot)
    if share >= 0.0:
        return one, two, share, grain, height
    if upland > 0.3:
        wood = sample(fields, west, south, slow.WOOD, x, y)
        broad = sample(fields, west, south, slow.BROAD, x, y)
        one, two, share, tone = _heights(key, x, y, height, wood, broad, sweep, epoch, fine, rough, spot, patch)
    elif sample(fields, west, south, slow.MOOR, x, y) - 2.0 * upland + 0.1 * spot > 0.56:
        one, two, share, tone = _marsh(fine, patch)
    else:
        one, two, share, tone = _farmland(
            key, fields, west, south, x, y, upland, season, epoch, fine, rough, spot, patch
        )
    return one, two, share, tone, height
