"""What is asked about a picture in seven languages, and what its pixels and its name answer."""

from __future__ import annotations

import numpy
from PIL import Image

from data.sample import Caption, Question

# kind of question -> language -> the question; names are put in as they are, undeclined
ASKED: dict[str, dict[str, str]] = {
    "name": {
        "zh": "这是什么？", "en": "what is this?", "fr": "qu'est-ce que c'est ?", "de": "was ist das?",
        "cs": "co je to?", "ja": "これは何？", "ko": "이것은 무엇인가요?",
    },
    "tone": {
        "zh": "肤色是什么？", "en": "what is the skin tone?", "fr": "quelle est la couleur de peau ?",
        "de": "welche Hautfarbe ist es?", "cs": "jaká je barva pleti?", "ja": "肌の色は？",
        "ko": "피부색은 무엇인가요?",
    },
    "colour": {
        "zh": "主要是什么颜色？", "en": "what is the main colour?", "fr": "quelle est la couleur principale ?",
        "de": "was ist die Hauptfarbe?", "cs": "jaká je hlavní barva?", "ja": "主な色は？",
        "ko": "주된 색은 무엇인가요?",
    },
    "count": {
        "zh": "有几个东西？", "en": "how many things are there?", "fr": "combien de choses y a-t-il ?",
        "de": "wie viele Dinge sind es?", "cs": "kolik je tu věcí?", "ja": "いくつありますか？",
        "ko": "몇 개가 있나요?",
    },
    "left": {
        "zh": "{name}的左边是什么？", "en": "what is left of {name}?", "fr": "qu'y a-t-il à gauche de {name} ?",
        "de": "was ist links von {name}?", "cs": "co je vlevo od {name}?", "ja": "{name}の左は何？",
        "ko": "{name} 왼쪽에는 무엇이 있나요?",
    },
    "above": {
        "zh": "{name}的上面是什么？", "en": "what is above {name}?", "fr": "qu'y a-t-il au-dessus de {name} ?",
        "de": "was ist über {name}?", "cs": "co je nad {name}?", "ja": "{name}の上は何？",
        "ko": "{name} 위에는 무엇이 있나요?",
    },
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray")
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "zh": ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "棕色", "黑色", "灰色"),
    "en": COLOURS,
    "fr": ("rouge", "orange", "jaune", "vert", "bleu", "violet", "rose", "marron", "noir", "gris"),
    "de": ("rot", "orange", "gelb", "grün", "blau", "lila", "rosa", "braun", "schwarz", "grau"),
    "cs": ("červená", "oranžová", "žlutá", "zelená", "modrá", "fialová", "růžová", "hnědá", "černá", "šedá"),
    "ja": ("赤", "オレンジ", "黄色", "緑", "青", "紫", "ピンク", "茶色", "黒", "灰色"),
    "ko": ("빨간색", "주황색", "노란색", "초록색", "파란색", "보라색", "분홍색", "갈색", "검은색", "회색"),
}
# of 256 steps around the circle, where each hue begins; red goes on from the last to the first
_HUES = ((0, "red"), (11, "orange"), (26, "yellow"), (47, "green"), (120, "blue"), (177, "purple"), (214, "pink"))
_FIRST_RED = 245
_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}  # code points of the five skin tones
MOST_WHITE = 235  # a pixel whose channels are all above this is background
LEAST_SHARE = 0.5  # of the other pixels, for a main colour
LEAST_SHOWN = 0.05  # of all pixels, for a colour at all


def ask_about(kind: str, language: str, answer: str, name: str = "") -> Question:
    """The question of a kind in a language that has one, with its answer."""
    return Question(language, ASKED[kind][language].format(name=name), answer, kind)


def base_name(concept: str | None, caption: Caption) -> str:
    """The name without a skin tone: "waving hand" of "waving hand: dark skin tone", but "flag: France" as it is."""
    if not _TONES.intersection((concept or "").split("-")):
        return caption.name
    return caption.name.replace("：", ":").partition(":")[0].strip()


def skin_tone(concept: str | None, caption: Caption) -> str | None:
    """What the name says of the skin tone; None where the picture has none, or the name says other things too."""
    tones = _TONES.intersection((concept or "").split("-"))
    told = caption.name.replace("：", ":").partition(":")[2].strip()
    return told if len(tones) == 1 and told and not any(comma in told for comma in ",，、") else None


def main_colour(image: Image.Image) -> str | None:
    """The colour (one of `COLOURS`) of at least half of an RGB picture's pixels but the white ones; None for none."""
    pixels = numpy.asarray(image.convert("RGB")).reshape(-1, 3)
    shown = ~(pixels > MOST_WHITE).all(axis=1)
    if shown.mean() < LEAST_SHOWN:
        return None
    hue, saturation, value = numpy.asarray(image.convert("HSV")).reshape(-1, 3)[shown].T.astype(int)
    found = numpy.full(len(hue), COLOURS.index("red"))
    for start, name in _HUES:
        found[(hue >= start) & (hue < _FIRST_RED)] = COLOURS.index(name)
    reds = (found == COLOURS.index("red")) | (found == COLOURS.index("pink"))
    found[reds & (saturation < 110) & (value > 180)] = COLOURS.index("pink")
    warm = (found == COLOURS.index("orange")) | (found == COLOURS.index("red"))
    found[warm & (value < 160) & (hue >= 5) & (hue < 47)] = COLOURS.index("brown")
    found[saturation < 40] = COLOURS.index("gray")
    found[(value < 60) | ((saturation < 40) & (value < 90))] = COLOURS.index("black")
    counts = numpy.bincount(found, minlength=len(COLOURS))
    return COLOURS[int(counts.argmax())] if counts.max() >= LEAST_SHARE * len(found) else None
