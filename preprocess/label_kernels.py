"""Numba kernels that give pixels the class of the land cover below them. Serial and without the GIL.

Between the nodes of a lattice coordinates change evenly along a row of pixels, so a row is taken cell by cell: where
the cell ends and how it steps is worked out once, and what is left for each pixel is an addition and a load.
"""

import numpy as np
from numba import njit

# Sheet pixels from its edge within which positions are looked at one by one: more than rounding can move them.
MARGIN = 1e-3

# Added to positions in a sheet: a pixel's centre that lies just on the edge of two of the sheet's pixels belongs to the
# latter, whatever rounding makes of it. Far more than rounding, far less than a lattice's error.
TIE = 2.0**-20

BLOCK = 64  # pixels looked at together; as wide as vectors get


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
def row_of(lattice_LL2, y, height, nodes_L2):
    """The lattice's coordinates at its columns of nodes on pixel row ``y``, into ``nodes_L2``."""
    rows = lattice_LL2.shape[0] - 1
    v = y * rows / max(height - 1, 1)
    j = min(int(v), rows - 1)
    v -= j
    for i in range(lattice_LL2.shape[1]):
        for k in range(2):
            nodes_L2[i, k] = (1 - v) * lattice_LL2[j, i, k] + v * lattice_LL2[j + 1, i, k]


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


@njit(nogil=True, cache=True, inline="always")
def _holds(east, lat, span, domain):
    """Whether a domain holds a point ``east`` degrees east of its western edge; false for NaN."""
    return 0.0 <= east < span and domain[1] <= lat < domain[3]


@njit(nogil=True, cache=True)
def _inside(lon, lat, domain):
    return _east_of(lon, domain[0]) < domain[2] - domain[0] and domain[1] <= lat < domain[3]


@njit(nogil=True, cache=True)
def _keep_inside(todo_W, nodes_L2, ends, domain):
    """Sets ``todo_W`` (uint8) to 0 where a row's longitude and latitude lie outside the domain.

    nodes_L2: longitude, latitude at the columns of nodes. domain: (west, south, east, north) in degrees; longitudes
    count modulo 360.
    """
    span, columns, width = domain[2] - domain[0], len(ends) - 1, len(todo_W)
    turn = _turn(nodes_L2[0, 0], domain[0])
    for i in range(columns):
        lon0, lat0, lon1, lat1 = nodes_L2[i, 0], nodes_L2[i, 1], nodes_L2[i + 1, 0], nodes_L2[i + 1, 1]
        # both ends of an even stretch inside, or on the same side of it: so is what lies between
        east0, east1 = lon0 - domain[0] - turn, lon1 - domain[0] - turn
        if not (0.0 <= east0 < 360.0):
            east0 = _east_of(lon0, domain[0])
            east1 = east0 + (lon1 - lon0)
        if 0.0 <= east1 < span and east0 < span and domain[1] <= min(lat0, lat1) and max(lat0, lat1) < domain[3]:
            continue
        outside = max(lat0, lat1) < domain[1] or min(lat0, lat1) >= domain[3]
        if outside or (east0 >= span and span <= east1 < 360.0):
            todo_W[ends[i] : ends[i + 1]] = 0
            continue
        for x in range(ends[i], ends[i + 1]):
            u = x * columns / max(width - 1, 1) - i
            if not _inside(lon0 + (lon1 - lon0) * u, lat0 + (lat1 - lat0) * u, domain):
                todo_W[x] = 0


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


@njit(nogil=True, cache=True)
def _take_stretch(labels_W, column, row, across, down, classes_hw):
    """Classes at positions that step evenly, all of them within the sheet and MARGIN away from its edges.

    Positions are counted in 2^-32 of a sheet's pixel, whole numbers: no conversion a pixel.
    """
    one = 4294967296.0
    c, r, dc, dr = np.int64(column * one), np.int64(row * one), np.int64(across * one), np.int64(down * one)
    count = len(labels_W)
    if r >> 32 == (r + dr * (count - 1)) >> 32:  # all in one row of the sheet, as most stretches are
        classes_w = classes_hw[r >> 32]
        for k in range(count):
            labels_W[k] = classes_w[np.uintp(c >> 32)]
            c += dc
        return
    for k in range(count):
        labels_W[k] = classes_hw[np.uintp(r >> 32), np.uintp(c >> 32)]
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


@njit(nogil=True, cache=True)
def _all_are(labels_W, label):
    differ = np.uint8(0)
    for x in range(len(labels_W)):
        differ |= labels_W[x] ^ label
    return differ == 0


@njit(nogil=True, cache=True)
def _some_are(labels_W, label):
    some = np.uint8(0)
    for x in range(len(labels_W)):
        some |= np.uint8(labels_W[x] == label)
    return some != 0


@njit(nogil=True, cache=True)
def any_are(labels_HW, label):
    """Whether any pixel has a label (uint8)."""
    for y in range(labels_HW.shape[0]):
        if _some_are(labels_HW[y], label):
            break
    else:
        return False
    return True


@njit(nogil=True, cache=True)
def _within(nodes_L2, first, width, height):
    """Whether a row's nodes lie in a sheet of width x height pixels from ``first`` on, MARGIN from its edges."""
    left, top, inside = first[0] + MARGIN, first[1] + MARGIN, True
    right, bottom = first[0] + width - 2 * MARGIN, first[1] + height - 2 * MARGIN
    for i in range(nodes_L2.shape[0]):
        column, row = nodes_L2[i, 0], nodes_L2[i, 1]
        inside &= (column >= left) & (column < right) & (row >= top) & (row < bottom)  # false for NaN
    return inside


@njit(nogil=True, cache=True)
def _all_inside(nodes_L2, domain):
    """Whether a row lies in the domain, given by longitude and latitude at its nodes."""
    turn = _turn(nodes_L2[0, 0], domain[0])
    for i in range(nodes_L2.shape[0]):
        if not _holds(nodes_L2[i, 0] - domain[0] - turn, nodes_L2[i, 1], domain[2] - domain[0], domain):
            return False
    return True


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
    columns, lonlat_columns = lattice_LL2.shape[1] - 1, lonlat_LL2.shape[1] - 1
    if (columns + 1 == width and lattice_LL2.shape[0] == height) or (
        use_domain and lonlat_columns + 1 == width and lonlat_LL2.shape[0] == height
    ):
        _pixel_by_pixel(labels_HW, nodata, lattice_LL2, classes_hw, first, period, lonlat_LL2, domain, use_domain)
        return
    ends, lonlat_ends = cell_ends(columns, width), cell_ends(lonlat_columns, width)
    nodes_L2, lonlat_L2 = np.empty((columns + 1, 2)), np.empty((lonlat_columns + 1, 2))
    todo_W = np.empty(width, np.uint8)
    for y in range(height):
        labels_W = labels_HW[y]
        fresh = _all_are(labels_W, nodata)
        if not fresh and not _some_are(labels_W, nodata):
            continue
        if use_domain:
            row_of(lonlat_LL2, y, height, lonlat_L2)
            fresh = fresh and _all_inside(lonlat_L2, domain)
        row_of(lattice_LL2, y, height, nodes_L2)
        if fresh and period == 0 and _within(nodes_L2, first, classes_hw.shape[1], classes_hw.shape[0]):
            _fill_row(labels_W, nodes_L2, 0, columns, ends, classes_hw, first)
            continue
        for x in range(width):
            todo_W[x] = labels_W[x] == nodata
        if use_domain:
            _keep_inside(todo_W, lonlat_L2, lonlat_ends, domain)
        left, right = _reach(todo_W)
        if left == right:
            continue
        outer, outer_end = np.searchsorted(ends, left, side="right") - 1, np.searchsorted(ends, right)
        begin = outer + (ends[outer] < left)
        end = max(begin, outer_end - (ends[outer_end] > right))
        plain = period == 0 and _all_are(todo_W[left:right], np.uint8(1))
        if not plain or not _within(nodes_L2[begin : end + 1], first, classes_hw.shape[1], classes_hw.shape[0]):
            begin, end = outer, outer
        _fill_some(labels_HW, y, todo_W, nodes_L2, outer, begin, ends, classes_hw, first, period)
        _fill_row(labels_W, nodes_L2, begin, end, ends, classes_hw, first)
        _fill_some(labels_HW, y, todo_W, nodes_L2, end, outer_end, ends, classes_hw, first, period)


@njit(nogil=True, cache=True, inline="always")
def _start(nodes_L2, i, u, first, cells_a_pixel):
    """(column, row, and their steps a pixel) at a share ``u`` of cell ``i``."""
    across, down = nodes_L2[i + 1, 0] - nodes_L2[i, 0], nodes_L2[i + 1, 1] - nodes_L2[i, 1]
    column = nodes_L2[i, 0] + across * u - first[0] + TIE
    row = nodes_L2[i, 1] + down * u - first[1] + TIE
    return column, row, across * cells_a_pixel, down * cells_a_pixel


@njit(nogil=True, cache=True)
def _fill_row(labels_W, nodes_L2, begin, end, ends, classes_hw, first):
    """All pixels of a row in the cells ``begin`` to ``end``, whose nodes lie in the sheet (see _within)."""
    cells_a_pixel = (len(ends) - 1) / max(len(labels_W) - 1, 1)
    for i in range(begin, end):
        column, row, across, down = _start(nodes_L2, i, ends[i] * cells_a_pixel - i, first, cells_a_pixel)
        _take_stretch(labels_W[ends[i] : ends[i + 1]], column, row, across, down, classes_hw)


@njit(nogil=True, cache=True)
def _reach(todo_W):
    """(first, end) of the pixels to do; (0, 0) for none."""
    left, right = 0, len(todo_W)
    while left + BLOCK <= right and not _some_are(todo_W[left : left + BLOCK], np.uint8(1)):
        left += BLOCK
    while left < right and not todo_W[left]:
        left += 1
    while left + BLOCK <= right and not _some_are(todo_W[right - BLOCK : right], np.uint8(1)):
        right -= BLOCK
    while left < right and not todo_W[right - 1]:
        right -= 1
    return (left, right) if left < right else (0, 0)


@njit(nogil=True, cache=True)
def _fill_some(labels_HW, y, todo_W, nodes_L2, begin, end, ends, classes_hw, first, period):
    """The pixels of row ``y`` for which ``todo_W`` is 1, in the cells ``begin`` to ``end``."""
    columns = len(ends) - 1
    cells_a_pixel = columns / max(len(todo_W) - 1, 1)
    for i in range(begin, end):
        left, right = ends[i], ends[i + 1]
        every, some = np.uint8(1), np.uint8(0)
        for x in range(left, right):
            every &= todo_W[x]
            some |= todo_W[x]
        if not some:
            continue
        column, row, across, down = _start(nodes_L2, i, left * cells_a_pixel - i, first, cells_a_pixel)
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
            _take_stretch(labels_HW[y, left:right], column, row, across, down, classes_hw)
            continue
        for x in range(left, right):
            if todo_W[x]:
                k = x - left
                _take(labels_HW, y, x, column + across * k, row + down * k, classes_hw, period)
