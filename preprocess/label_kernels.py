"""Numba kernels that give pixels the class of the land cover below them. Serial and without the GIL.

Between the nodes of a lattice coordinates change evenly along a row of pixels, so a row is taken cell by cell: where
the cell ends and how it steps is worked out once, and what is left for each pixel is an addition and a load. Whether a
cell lies in the sheet and in its domain shows in the cell's corners, once for all of its rows.
"""

import numpy as np
from numba import njit

# Sheet pixels from its edge within which positions are looked at one by one: more than rounding can move them.
MARGIN = 1e-3

# Added to positions in a sheet: a pixel's centre that lies just on the edge of two of the sheet's pixels belongs to the
# latter, whatever rounding makes of it. Far more than rounding, far less than a lattice's error.
TIE = 2.0**-20

# What a cell's pixels need: nothing, since all of them lie elsewhere; a load each; a look at each.
SKIP, FILL, LOOK = 0, 1, 2


@njit(nogil=True, cache=True)
def between(lattice_LL2, x, y, width, height):
    """A lattice's two coordinates at the centre of pixel (x, y) of a grid of width x height pixels.

    The lattice's nodes lie evenly from the centre of the first pixel to that of the last; one node a pixel is
    taken as it is, since next to a node that is NaN even a weight of 0 would give NaN.
    """
    rows, columns = lattice_LL2.shape[0] - 1, lattice_LL2.shape[1] - 1
    if rows + 1 == height and columns + 1 == width:
        return lattice_LL2[y, x, 0], lattice_LL2[y, x, 1]
    u, v = x * columns / max(width - 1, 1), y * rows / max(height - 1, 1)
    i, j = min(int(u), columns - 1), min(int(v), rows - 1)
    u, v = u - i, v - j
    w00, w01, w10, w11 = (1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v
    a, b, c, d = lattice_LL2[j, i], lattice_LL2[j, i + 1], lattice_LL2[j + 1, i], lattice_LL2[j + 1, i + 1]
    return (
        w00 * a[0] + w01 * b[0] + w10 * c[0] + w11 * d[0],
        w00 * a[1] + w01 * b[1] + w10 * c[1] + w11 * d[1],
    )


@njit(nogil=True, cache=True)
def cell_ends(columns, width):
    """First pixel of each of a lattice's columns of cells, and the end: int64 [columns + 1]."""
    ends = np.empty(columns + 1, np.int64)
    for i in range(columns):
        ends[i] = -(-i * (width - 1) // columns)
    ends[columns] = width
    return ends


@njit(nogil=True, cache=True)
def translate(codes_hw, lookup, lookup_offset):
    """Classes of codes, uint8 [h, w]: lookup[code + lookup_offset]."""
    height, width = codes_hw.shape
    classes_hw = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            classes_hw[y, x] = lookup[np.int64(codes_hw[y, x]) + lookup_offset]
    return classes_hw


@njit(nogil=True, cache=True, inline="always")
def _east_of(lon, west):
    """Degrees from ``west`` eastward to ``lon``, 0 to 360."""
    return lon - west - _turn(lon, west)


@njit(nogil=True, cache=True, inline="always")
def _turn(lon, west):
    """The whole turns in degrees by which ``lon`` lies beyond ``west``."""
    return 360.0 * np.floor((lon - west) / 360.0)  # many times faster than the % operator


@njit(nogil=True, cache=True)
def _inside(lon, lat, domain):
    return _east_of(lon, domain[0]) < domain[2] - domain[0] and domain[1] <= lat < domain[3]


@njit(nogil=True, cache=True)
def _take(labels_HW, y, x, column, row, classes_hw, period):
    """The class at a sheet's pixel position for one pixel, if the sheet reaches there."""
    if not (np.isfinite(column) and np.isfinite(row)):
        return
    if period > 0:
        column = column % period
    c, r = np.floor(column), np.floor(row)
    if 0 <= c < classes_hw.shape[1] and 0 <= r < classes_hw.shape[0]:
        labels_HW[y, x] = classes_hw[int(r), int(c)]


@njit(nogil=True, cache=True, inline="always")
def _take_stretch(labels_HW, y, left, right, stretch, classes_hw):
    """Classes at positions that step evenly (see _positions), all within the sheet and MARGIN away from its edges.

    Positions are counted in 2^-32 of a sheet's pixel, whole numbers: no conversion a pixel. Nor is a slice taken of an
    array, for that takes as long as a dozen pixels.
    """
    one = 4294967296.0
    column, row, across, down = stretch
    c, r, dc, dr = np.int64(column * one), np.int64(row * one), np.int64(across * one), np.int64(down * one)
    if r >> 32 == (r + dr * (right - left - 1)) >> 32:  # all in one row of the sheet, as most stretches are
        for x in range(left, right):
            labels_HW[np.uintp(y), np.uintp(x)] = classes_hw[np.uintp(r >> 32), np.uintp(c >> 32)]
            c += dc
    else:
        for x in range(left, right):
            labels_HW[np.uintp(y), np.uintp(x)] = classes_hw[np.uintp(r >> 32), np.uintp(c >> 32)]
            c += dc
            r += dr


@njit(nogil=True, cache=True)
def _pixel_by_pixel(labels_HW, nodata, lattice_LL2, classes_hw, first, period, lonlat_LL2, domain, use_domain):
    height, width = labels_HW.shape
    for y in range(height):
        for x in range(width):
            if labels_HW[y, x] != nodata:
                continue
            if use_domain:
                lon, lat = between(lonlat_LL2, x, y, width, height)
                if not _inside(lon, lat, domain):
                    continue
            column, row = between(lattice_LL2, x, y, width, height)
            _take(labels_HW, y, x, column - first[0] + TIE, row - first[1] + TIE, classes_hw, period)


@njit(nogil=True, cache=True, inline="always")
def _all_are(labels_HW, y, left, right, label):
    """Whether the pixels ``left`` to ``right`` of a row have a label (uint8)."""
    differ = np.uint8(0)
    for x in range(left, right):
        differ |= labels_HW[np.uintp(y), np.uintp(x)] ^ label
    return differ == 0


@njit(nogil=True, cache=True)
def any_are(labels_HW, label):
    """Whether any pixel has a label."""
    value = np.uint8(label)  # of the pixels' width: more of them are looked at together
    for y in range(labels_HW.shape[0]):
        some = np.uint8(0)
        for x in range(labels_HW.shape[1]):
            some |= np.uint8(labels_HW[y, x] == value)
        if some:
            return True
    return False


@njit(nogil=True, cache=True)
def _sheet_states(states_C, lattice_LL2, j, first, width, height, period):
    """What the cells in row ``j`` of a lattice need of a sheet's width x height pixels from ``first`` on.

    FILL: all corners lie in it, MARGIN from its edges, and so does what is between them.
    """
    left, top, right, bottom = first[0], first[1], first[0] + width, first[1] + height
    for i in range(len(states_C)):
        within, west, east, north, south = period == 0, True, True, True, True
        for corner in range(4):
            column, row = lattice_LL2[j + corner // 2, i + corner % 2]
            within &= left + MARGIN <= column < right - 2 * MARGIN and top + MARGIN <= row < bottom - 2 * MARGIN
            west &= column < left - MARGIN  # these are false for NaN, too
            east &= column > right + MARGIN
            north &= row < top - MARGIN
            south &= row > bottom + MARGIN
        around = period > 0  # columns come round; rows do not
        outside = north or south or ((west or east) and not around)
        states_C[i] = FILL if within else SKIP if outside else LOOK


@njit(nogil=True, cache=True)
def _domain_states(states_C, lonlat_LL2, top, bottom, ends, height, domain):
    """What the cells of pixel rows ``top`` to ``bottom`` (included) need of a domain: FILL where all of it is inside.

    By the nodes of longitude and latitude that lie around them. ends: of the cells.
    """
    rows, columns, width = lonlat_LL2.shape[0] - 1, lonlat_LL2.shape[1] - 1, ends[len(ends) - 1]
    first_row = min(top * rows // max(height - 1, 1), rows)
    last_row = min(-(-bottom * rows // max(height - 1, 1)), rows)
    span = domain[2] - domain[0]
    for i in range(len(states_C)):
        first_column = min(ends[i] * columns // max(width - 1, 1), columns)
        last_column = min(-(-(ends[i + 1] - 1) * columns // max(width - 1, 1)), columns)
        turn = _turn(lonlat_LL2[first_row, first_column, 0], domain[0])
        within, beyond, north, south = True, True, True, True
        for j in range(first_row, last_row + 1):
            for k in range(first_column, last_column + 1):
                east, lat = lonlat_LL2[j, k, 0] - domain[0] - turn, lonlat_LL2[j, k, 1]
                within &= 0.0 <= east < span and domain[1] <= lat < domain[3]
                beyond &= span <= east < 360.0
                north &= lat >= domain[3]
                south &= lat < domain[1]
        states_C[i] = FILL if within else SKIP if beyond or north or south else LOOK


@njit(nogil=True, cache=True)
def gather_labels(labels_HW, nodata, lattice_LL2, classes_hw, first, period, lonlat_LL2, domain, use_domain):
    """Fills pixels of ``labels_HW`` (uint8, in place) that are still ``nodata`` from one land-cover sheet.

    lattice_LL2: sheet pixel coordinates (column, row) at nodes spread over the label grid (see between), no closer
        than its pixels. NaN marks ground the sheet's CRS cannot express.
    classes_hw: uint8, the sheet's classes from pixel ``first`` = (column, row) on.
    period: columns after which the sheet repeats (360 degrees), 0 if it does not.
    lonlat_LL2, domain: longitudes and latitudes at nodes of their own, and (west, south, east, north): with
        ``use_domain`` only pixels inside are filled; longitudes count modulo 360.
    """
    height, width = labels_HW.shape
    rows, columns = lattice_LL2.shape[0] - 1, lattice_LL2.shape[1] - 1
    if (columns + 1 == width and rows + 1 == height) or (
        use_domain and lonlat_LL2.shape[1] == width and lonlat_LL2.shape[0] == height
    ):
        _pixel_by_pixel(labels_HW, nodata, lattice_LL2, classes_hw, first, period, lonlat_LL2, domain, use_domain)
        return
    label = np.uint8(nodata)
    ends, todo_W = cell_ends(columns, width), np.empty(width, np.uint8)
    states_C, in_sheet_C, in_domain_C = np.empty((3, columns), np.uint8)
    in_domain_C[:] = FILL
    starts_C8 = np.empty((columns, 8))
    begin, end, band = 0, 0, -1
    for y in range(height):
        v = y * rows / max(height - 1, 1)
        j = min(int(v), rows - 1)
        if j != band:
            band = j
            _sheet_states(in_sheet_C, lattice_LL2, j, first, classes_hw.shape[1], classes_hw.shape[0], period)
            if use_domain:
                bottom = min(-(-(j + 1) * (height - 1) // rows), height - 1)
                _domain_states(in_domain_C, lonlat_LL2, y, bottom, ends, height, domain)
            for i in range(columns):
                elsewhere = in_sheet_C[i] == SKIP or in_domain_C[i] == SKIP
                states_C[i] = SKIP if elsewhere else max(in_sheet_C[i], in_domain_C[i])
            begin, end = _reach(states_C)
            _positions(starts_C8, lattice_LL2, j, ends, first)
        if begin == end:
            continue
        v -= j
        for i in range(begin, end):
            if states_C[i] == SKIP:
                continue
            column, row = starts_C8[i, 0] + v * starts_C8[i, 4], starts_C8[i, 1] + v * starts_C8[i, 5]
            across, down = starts_C8[i, 2] + v * starts_C8[i, 6], starts_C8[i, 3] + v * starts_C8[i, 7]
            stretch = column, row, across, down
            left, right = ends[i], ends[i + 1]
            if states_C[i] == FILL and _all_are(labels_HW, y, left, right, label):
                _take_stretch(labels_HW, y, left, right, stretch, classes_hw)
                continue
            for x in range(left, right):
                todo_W[x] = labels_HW[y, x] == label
            if in_domain_C[i] == LOOK:
                _keep_inside(todo_W, left, right, y, height, lonlat_LL2, domain)
            _take_some(labels_HW, y, left, right, todo_W, stretch, classes_hw, period)


@njit(nogil=True, cache=True)
def _reach(states_C):
    """(first, end) of the cells that are not SKIP; (0, 0) for none."""
    left, right = 0, len(states_C)
    while left < right and states_C[left] == SKIP:
        left += 1
    while left < right and states_C[right - 1] == SKIP:
        right -= 1
    return (left, right) if left < right else (0, 0)


@njit(nogil=True, cache=True)
def _positions(starts_C8, lattice_LL2, j, ends, first):
    """Where the first pixels of the cells in row ``j`` of a lattice lie, and their steps a pixel.

    starts_C8: column, row, steps of both, in the sheet from ``first`` on, at the cell's upper end, and how much they
    differ at its lower end. In between they change evenly.
    """
    columns = len(ends) - 1
    cells_a_pixel = columns / max(ends[columns] - 1, 1)
    for i in range(columns):
        u = ends[i] * cells_a_pixel - i
        for k in range(2):
            above, below = lattice_LL2[j, i, k], lattice_LL2[j + 1, i, k]
            step_above, step_below = lattice_LL2[j, i + 1, k] - above, lattice_LL2[j + 1, i + 1, k] - below
            starts_C8[i, k] = above + step_above * u - first[k] + TIE
            starts_C8[i, 2 + k] = step_above * cells_a_pixel
            starts_C8[i, 4 + k] = (below - above) + (step_below - step_above) * u
            starts_C8[i, 6 + k] = (step_below - step_above) * cells_a_pixel


@njit(nogil=True, cache=True)
def _keep_inside(todo_W, left, right, y, height, lonlat_LL2, domain):
    """Sets ``todo_W`` (uint8) to 0 where pixels ``left`` to ``right`` of row ``y`` lie outside the domain."""
    rows, columns, width = lonlat_LL2.shape[0] - 1, lonlat_LL2.shape[1] - 1, len(todo_W)
    v = y * rows / max(height - 1, 1)
    j = min(int(v), rows - 1)
    v -= j
    last, lon, lat, lon_step, lat_step = -1, 0.0, 0.0, 0.0, 0.0
    for x in range(left, right):
        u = x * columns / max(width - 1, 1)
        i = min(int(u), columns - 1)
        if i != last:
            last = i
            lon = (1 - v) * lonlat_LL2[j, i, 0] + v * lonlat_LL2[j + 1, i, 0]
            lat = (1 - v) * lonlat_LL2[j, i, 1] + v * lonlat_LL2[j + 1, i, 1]
            lon_step = (1 - v) * lonlat_LL2[j, i + 1, 0] + v * lonlat_LL2[j + 1, i + 1, 0] - lon
            lat_step = (1 - v) * lonlat_LL2[j, i + 1, 1] + v * lonlat_LL2[j + 1, i + 1, 1] - lat
        if todo_W[x]:
            todo_W[x] = _inside(lon + lon_step * (u - i), lat + lat_step * (u - i), domain)


@njit(nogil=True, cache=True)
def _take_some(labels_HW, y, left, right, todo_W, stretch, classes_hw, period):
    """Classes of those of the pixels ``left`` to ``right`` of row ``y`` for which ``todo_W`` is 1."""
    every, some = np.uint8(1), np.uint8(0)
    for x in range(left, right):
        every &= todo_W[x]
        some |= todo_W[x]
    if not some:
        return
    column, row, across, down = stretch
    if period > 0 and np.isfinite(column):
        column = column % period
    end_column, end_row = column + across * (right - left - 1), row + down * (right - left - 1)
    if (
        every
        and min(column, end_column) >= MARGIN
        and max(column, end_column) < classes_hw.shape[1] - MARGIN
        and min(row, end_row) >= MARGIN
        and max(row, end_row) < classes_hw.shape[0] - MARGIN
    ):
        _take_stretch(labels_HW, y, left, right, (column, row, across, down), classes_hw)
        return
    for x in range(left, right):
        if todo_W[x]:
            k = x - left
            _take(labels_HW, y, x, column + across * k, row + down * k, classes_hw, period)
