"""What the demo landscape is made of: surfaces, their GlobeLand30 class, and their reflectance in four bands.

Reflectances are typical of late summer at 50 degrees north, times 10,000: blue, green, red, near infrared.
"""

import numpy as np

CULTIVATED, FOREST, GRASS, SHRUB, WETLAND, WATER, ARTIFICIAL, BARE, SNOW = 10, 20, 30, 40, 50, 60, 80, 90, 100

_TABLE: list[tuple[str, int, tuple[int, int, int, int]]] = [
    ("deep_water", WATER, (460, 430, 250, 140)),
    ("shallow_water", WATER, (560, 720, 430, 230)),
    ("river_water", WATER, (640, 800, 560, 300)),
    ("reed", WETLAND, (350, 640, 460, 2500)),
    ("moor", WETLAND, (400, 620, 620, 1950)),
    ("conifer", FOREST, (255, 430, 300, 2150)),
    ("broadleaf", FOREST, (260, 520, 290, 3600)),
    ("shrub", SHRUB, (330, 590, 440, 2650)),
    ("young_wood", FOREST, (290, 590, 340, 3300)),
    ("clearing", GRASS, (480, 720, 720, 2500)),
    ("meadow", GRASS, (340, 740, 370, 4200)),
    ("pasture", GRASS, (410, 780, 560, 3450)),
    ("mown_meadow", GRASS, (520, 930, 720, 3300)),
    ("alpine_grass", GRASS, (430, 740, 600, 2900)),
    ("green_cereal", CULTIVATED, (330, 690, 390, 3900)),
    ("ripe_cereal", CULTIVATED, (600, 970, 1080, 2700)),
    ("stubble", CULTIVATED, (760, 1060, 1280, 2400)),
    ("maize", CULTIVATED, (310, 650, 340, 4400)),
    ("beet", CULTIVATED, (290, 710, 270, 5300)),
    ("rape", CULTIVATED, (450, 850, 800, 3200)),
    ("soil", CULTIVATED, (700, 920, 1200, 1750)),
    ("dark_soil", CULTIVATED, (500, 630, 800, 1250)),
    ("asphalt", ARTIFICIAL, (950, 1050, 1100, 1350)),
    ("concrete", ARTIFICIAL, (1550, 1700, 1800, 2100)),
    ("red_roof", ARTIFICIAL, (780, 930, 1500, 2000)),
    ("grey_roof", ARTIFICIAL, (1020, 1120, 1190, 1400)),
    ("white_roof", ARTIFICIAL, (3000, 3150, 3200, 3350)),
    ("garden", ARTIFICIAL, (420, 700, 530, 2900)),
    ("rock", BARE, (1000, 1130, 1220, 1500)),
    ("scree", BARE, (1300, 1430, 1510, 1790)),
    ("gravel", BARE, (1500, 1720, 1850, 2100)),
    ("quarry", BARE, (1120, 1440, 1780, 2300)),
    ("track", CULTIVATED, (850, 1070, 1300, 2100)),
    ("snow", SNOW, (8300, 8400, 8300, 7600)),
]
(
    DEEP_WATER,
    SHALLOW_WATER,
    RIVER_WATER,
    REED,
    MOOR,
    CONIFER,
    BROADLEAF,
    SHRUBS,
    YOUNG_WOOD,
    CLEARING,
    MEADOW,
    PASTURE,
    MOWN_MEADOW,
    ALPINE_GRASS,
    GREEN_CEREAL,
    RIPE_CEREAL,
    STUBBLE,
    MAIZE,
    BEET,
    RAPE,
    SOIL,
    DARK_SOIL,
    ASPHALT,
    CONCRETE,
    RED_ROOF,
    GREY_ROOF,
    WHITE_ROOF,
    GARDEN,
    ROCK,
    SCREE,
    GRAVEL,
    QUARRY,
    TRACK,
    SNOWFIELD,
) = range(len(_TABLE))

BANDS = ("blue", "green", "red", "near_infrared")
WAVELENGTHS_NM = (490.0, 560.0, 665.0, 842.0)
NAMES = tuple(name for name, _, _ in _TABLE)
# uint8 [materials]; float32 [materials, bands], reflectance 0..1
CLASS_OF = np.array([code for _, code, _ in _TABLE], np.uint8)
SPECTRA = np.array([spectrum for _, _, spectrum in _TABLE], np.float32) / 10_000
