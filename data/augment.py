"""Other views of a picture: shifted, scaled, and mirrored where direction is no part of what it means."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy
from PIL import Image

from data.images import to_square
from data.sample import Sample

MOST_SHIFT = 0.06  # of the side, either way
LEAST_SCALE, MOST_SCALE = 0.85, 1.1
MARGIN = 0.2  # of the side, on every side: what the outermost pixels are repeated for

# Words of names and keywords, as stems; Chinese, Japanese and Korean have no word boundaries.
_DIRECTED_WORDS = (
    # sides, turns, order
    r"left|right|east|west|north|south|clockwise|arrows?|next|previous|back|forward|rewind|fast|end|soon|return|play|"
    r"links|rechts|pfeile?|uhrzeigersinn|weiter|zurück|gauche|droite|flèches?|suivant|précédent|retour|"
    r"vlevo|vpravo|lev[áýéo]\w*|prav[áýéo]\w*|šipk\w*|"
    # writing, figures, time, money
    r"flags?|text|letters?|words?|alphabet|numbers?|digits?|keycap|input|buttons?|signs?|symbols?|marks?|questions?|clocks?|"
    r"watch|watches|o['’]clock|time|calendars?|dates?|news\w*|page|receipt|ticket|abc|points?|percent|"
    r"money|dollars?|euros?|yen|pounds?|banknotes?|coins?|currenc\w+|charts?|graphs?|globe|maps?|moons?|notes?|music\w*|"
    r"zodiac|flaggen?|buchstaben?|zahl|ziffern?|taste|schaltfläche|uhr|kalender|drapeaux?|lettres?|chiffres?|touche|"
    r"bouton|horloge|calendrier|vlajk\w*|písmen\w*|číslic\w*|tlačítk\w*|hodin\w*|kalendář\w*"
)
_DIRECTED = re.compile(
    rf"\b(?:{_DIRECTED_WORDS})\b|\d|[左右东西南北]|箭头|旗|字母|数字|按钮|符号|时钟|钟|日历|图表|月|钱|"
    r"矢印|文字|ボタン|時計|カレンダー|왼|오른|화살|깃발|국기|글자|숫자|버튼|시계|달력",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PictureView:
    """The centre of the view (shares of the side away from the picture's), the side it shows as a share, mirrored."""

    right: float
    down: float
    side: float
    mirrored: bool


def draw_view(sample: Sample, number: int) -> PictureView:
    """View `number` of a sample's picture; the sample's id and the number decide it. Half of the views are mirrored."""
    rng = random.Random(f"{sample.id} {number}")
    right, down = (rng.uniform(-MOST_SHIFT, MOST_SHIFT) for _ in range(2))
    side = 1 / rng.uniform(LEAST_SCALE, MOST_SCALE)
    return PictureView(right, down, side, rng.random() < 0.5 and may_be_mirrored(sample))


def may_be_mirrored(sample: Sample) -> bool:
    """Whether no name, keyword or question of a sample speaks of direction, writing, figures, time, money or maps.

    A sample without captions may not: nothing says what its picture means.
    """
    texts = [text for caption in sample.captions.values() for text in (caption.name, *caption.keywords)]
    texts += [text for asked in sample.questions for text in (asked.question, asked.answer)]
    return bool(sample.captions) and not any(_DIRECTED.search(text) for text in texts)


def view_square(image: Image.Image, size: int, view: PictureView) -> Image.Image:
    """A view of the centre square of an RGB picture, `size` px a side; beyond its edge the outermost pixels go on."""
    square = to_square(image, min(*image.size, 4 * size))
    margin = round(MARGIN * square.width)
    padding = ((margin, margin), (margin, margin), (0, 0))
    wide = Image.fromarray(numpy.pad(numpy.asarray(square), padding, mode="edge"))
    half = view.side * square.width / 2
    x, y = (margin + (0.5 + shift) * square.width for shift in (view.right, view.down))
    found = wide.resize((size, size), Image.Resampling.LANCZOS, (x - half, y - half, x + half, y + half))
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.mirrored else found
