"""Short descriptions of pictures put together from nouns, as people search for pictures, in seven languages.

No phrase needs a case, a gender or an article that a dictionary does not tell: French adjectives here have one form,
Czech frames take the nominative, and German ones the dative of the dictionary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.recipes.text_sources import Noun


@dataclass(frozen=True)
class Phrases:
    """Frames of one language. {x} and {y} are nouns, {a} and {b} the same with an article (English, German).

    The + of a modifier is the ending of the noun's gender: "rot+" is "roter", "rote" or "rotes".
    """

    modified: tuple[str, ...]  # {m} is a modifier, {n} its article
    modifiers: tuple[str, ...]
    pictures: tuple[str, ...]
    scenes: tuple[str, ...]
    pairs: tuple[str, ...]  # {w} is the Korean particle "and"
    endings: Mapping[str, str] = field(default_factory=dict)


PHRASES = {
    "zh": Phrases(
        modified=("{m}{x}",),
        modifiers=(
            "红色的", "蓝色的", "绿色的", "黄色的", "黑色的", "白色的", "粉色的", "紫色的", "橙色的", "棕色的",
            "灰色的", "金色的", "银色的", "大", "小", "巨大的", "可爱的", "漂亮的", "破旧的", "古老的", "新的",
            "圆形的", "方形的", "透明的", "发光的", "木制的", "金属的", "玻璃的", "石头做的", "彩色的", "空的",
            "孤独的", "快乐的", "悲伤的", "正在奔跑的", "正在睡觉的", "正在飞的", "跳舞的", "戴帽子的", "戴眼镜的",
            "破碎的", "冰冻的", "燃烧的", "湿的", "干净的", "肮脏的",
        ),
        pictures=(
            "一张{x}的照片", "{x}的图片", "{x}的图标", "{x}的插画", "{x}的素描", "一幅{x}的画", "{x}的水彩画",
            "{x}的特写", "{x}的卡通画", "儿童画的{x}", "{x}的黑白照片", "{x}的轮廓", "许多{x}", "两个{x}", "没有{x}",
            "{x}的剪影",
        ),
        scenes=(
            "桌子上的{x}", "雪中的{x}", "水里的{x}", "草地上的{x}", "夜晚的{x}", "海边的{x}", "森林里的{x}",
            "白色背景上的{x}", "阳光下的{x}", "城市里的{x}", "盒子里的{x}", "手里的{x}", "窗边的{x}", "太空中的{x}",
            "雨中的{x}", "山顶的{x}",
        ),
        pairs=(
            "{x}和{y}", "{x}与{y}", "{x}旁边的{y}", "{x}上的{y}", "{x}里的{y}", "带着{y}的{x}", "{x}、{y}",
            "像{x}一样的{y}",
        ),
    ),
    "en": Phrases(
        modified=("{m} {x}", "{n} {m} {x}", "the {m} {x}"),
        modifiers=(
            "red", "blue", "green", "yellow", "black", "white", "pink", "purple", "brown", "grey", "golden", "silver",
            "big", "small", "giant", "tiny", "cute", "beautiful", "broken", "new", "round", "square", "transparent",
            "glowing", "wooden", "metal", "glass", "stone", "colourful", "lonely", "happy", "sad", "running",
            "sleeping", "flying", "dancing", "smiling", "frozen", "burning", "wet", "clean", "dirty", "striped",
            "spotted", "rusty", "plastic", "shiny", "fluffy", "cartoon", "flat", "tall", "long", "half", "melting",
            "crying", "sitting",
        ),
        pictures=(
            "a photo of {a}", "a picture of {a}", "an icon of {a}", "a drawing of {a}", "a painting of {a}",
            "{x} icon", "a sketch of {a}", "a close-up of {a}", "a cartoon of {a}", "clip art of {a}",
            "a watercolour of {a}", "a child's drawing of {a}", "a black and white photo of {a}",
            "the outline of {a}", "an emoji of {a}", "a 3D rendering of {a}", "many pictures of {a}",
            "a logo with {a}", "a toy {x}", "{x} symbol",
        ),
        scenes=(
            "{a} on a table", "{a} in the snow", "{a} under water", "{a} on the grass", "{a} at night",
            "{a} by the sea", "{a} in a forest", "{a} on a white background", "{a} in the sun", "{a} in the city",
            "{a} in a box", "{a} in the hand", "{a} at the window", "{a} in space", "{a} in the rain",
            "{a} on a mountain",
        ),
        pairs=(
            "{x} and {y}", "{a} next to {b}", "{a} on {b}", "{a} with {b}", "{a} in {b}", "{x}, {y}",
            "{a} without {b}", "{a} in the shape of {b}", "{a} behind {b}",
        ),
    ),
    "fr": Phrases(
        modified=("{x} {m}",),
        modifiers=(
            "rouge", "jaune", "rose", "orange", "marron", "minuscule", "énorme", "gigantesque", "magnifique",
            "triste", "solitaire", "sale", "propre", "étrange", "fragile", "moderne", "antique", "sauvage", "rapide",
            "immobile", "humide", "vide", "multicolore", "bleu ciel", "vert pomme", "en bois", "en métal", "en verre",
            "en pierre", "en plastique", "en or", "à rayures", "à pois", "qui court", "qui dort", "qui vole",
            "qui danse", "qui sourit", "qui pleure", "qui brille", "en feu", "sous la neige", "de couleur verte",
            "de couleur bleue", "noir et blanc",
        ),
        pictures=(
            "photo : {x}", "une photo avec {x}", "dessin : {x}", "une image avec {x}", "icône {x}",
            "un dessin avec {x}", "une peinture avec {x}", "{x} en dessin animé", "{x} en gros plan",
            "{x} à l’aquarelle", "{x} en noir et blanc", "symbole {x}", "{x} dessiné par un enfant",
            "silhouette : {x}", "beaucoup de photos, {x}",
        ),
        scenes=(
            "{x} sur une table", "{x} dans la neige", "{x} sous l’eau", "{x} dans l’herbe", "{x} la nuit",
            "{x} au bord de la mer", "{x} dans une forêt", "{x} sur fond blanc", "{x} au soleil", "{x} en ville",
            "{x} dans une boîte", "{x} dans la main", "{x} à la fenêtre", "{x} dans l’espace", "{x} sous la pluie",
        ),
        pairs=("{x} et {y}", "{x}, {y}", "{x} avec {y}", "{x} ou {y}", "{x} sans {y}", "{x} sur {y}", "{x} sous {y}"),
    ),
    "de": Phrases(
        modified=("{m} {x}",),
        modifiers=(
            "rot+", "blau+", "grün+", "gelb+", "schwarz+", "weiß+", "rosarot+", "violett+", "braun+", "grau+",
            "golden+", "silbern+", "groß+", "klein+", "riesig+", "winzig+", "süß+", "schön+", "kaputt+", "alt+",
            "neu+", "rund+", "eckig+", "durchsichtig+", "leuchtend+", "hölzern+", "gläsern+", "bunt+", "leer+",
            "einsam+", "fröhlich+", "traurig+", "laufend+", "schlafend+", "fliegend+", "tanzend+", "lachend+",
            "gefroren+", "brennend+", "nass+", "sauber+", "schmutzig+", "gestreift+", "gepunktet+", "rostig+",
            "steinern+", "weinend+", "sitzend+",
        ),
        pictures=(
            "ein Foto von {a}", "ein Bild von {a}", "eine Zeichnung von {a}", "ein Gemälde von {a}",
            "ein Symbol: {x}", "eine Skizze von {a}", "eine Nahaufnahme von {a}", "{x} als Zeichentrick",
            "ein Aquarell von {a}", "die Kinderzeichnung von {a}", "ein Schwarzweißfoto von {a}",
            "der Umriss von {a}", "Symbol mit {a}",
        ),
        scenes=(
            "{x} auf dem Tisch", "{x} im Schnee", "{x} unter Wasser", "{x} auf der Wiese", "{x} bei Nacht",
            "{x} am Meer", "{x} im Wald", "{x} vor weißem Hintergrund", "{x} in der Sonne", "{x} in der Stadt",
            "{x} in einer Schachtel", "{x} in der Hand", "{x} am Fenster", "{x} im Weltall", "{x} im Regen",
            "{x} auf dem Berg",
        ),
        pairs=(
            "{x} und {y}", "{x} neben {b}", "{x} auf {b}", "{x} mit {b}", "{x} in {b}", "{x}, {y}", "{x} hinter {b}",
            "{x} oder {y}",
        ),
        endings={"m": "er", "f": "e", "n": "es"},
    ),
    "cs": Phrases(
        modified=("{m} {x}",),
        modifiers=(
            "červen+", "modr+", "zelen+", "žlut+", "čern+", "bíl+", "růžov+", "fialov+", "oranžov+", "hněd+", "šed+",
            "zlat+", "stříbrn+", "velk+", "mal+", "obrovsk+", "roztomil+", "krásn+", "rozbit+", "star+", "nov+",
            "kulat+", "hranat+", "průhledn+", "dřevěn+", "kovov+", "skleněn+", "kamenn+", "barevn+", "prázdn+",
            "osaměl+", "smutn+", "vesel+", "zmrzl+", "mokr+", "čist+", "špinav+", "pruhovan+", "puntíkovan+",
            "rezav+", "hořící", "běžící", "spící", "létající", "tančící", "zářící", "plačící", "sedící",
        ),
        pictures=(
            "{x} na fotce", "{x} na obrázku", "fotografie: {x}", "obrázek: {x}", "kresba: {x}", "ikona: {x}",
            "{x} jako kreslená postavička", "{x} zblízka", "akvarel: {x}", "{x} na černobílé fotografii",
            "obrys: {x}", "{x} na dětské kresbě", "na obrázku je {x}", "symbol: {x}",
        ),
        scenes=(
            "{x} na stole", "{x} ve sněhu", "{x} pod vodou", "{x} na trávě", "{x} v noci", "{x} u moře", "{x} v lese",
            "{x} na bílém pozadí", "{x} na slunci", "{x} ve městě", "{x} v krabici", "{x} v ruce", "{x} u okna",
            "{x} ve vesmíru", "{x} v dešti", "{x} na hoře",
        ),
        pairs=("{x} a {y}", "{x}, {y}", "{x} nebo {y}", "{x}, vedle toho {y}", "{x} a vedle {y}", "{x}, vzadu {y}"),
        endings={"m": "ý", "f": "á", "n": "é"},
    ),
    "ja": Phrases(
        modified=("{m}{x}",),
        modifiers=(
            "赤い", "青い", "緑の", "黄色い", "黒い", "白い", "ピンクの", "紫の", "オレンジ色の", "茶色い", "灰色の",
            "金色の", "銀色の", "大きな", "小さな", "巨大な", "かわいい", "美しい", "壊れた", "古い", "新しい",
            "丸い", "四角い", "透明な", "光る", "木の", "金属の", "ガラスの", "石の", "カラフルな", "空っぽの",
            "孤独な", "うれしそうな", "悲しそうな", "走っている", "寝ている", "飛んでいる", "踊っている",
            "帽子をかぶった", "眼鏡をかけた", "凍った", "燃えている", "濡れた", "きれいな", "汚い", "縞模様の",
        ),
        pictures=(
            "{x}の写真", "{x}の絵", "{x}のアイコン", "{x}のイラスト", "{x}のスケッチ", "{x}の水彩画", "{x}のアップ",
            "{x}のアニメ", "子供が描いた{x}", "{x}の白黒写真", "{x}のシルエット", "たくさんの{x}", "二つの{x}",
            "{x}のマーク", "{x}の絵文字",
        ),
        scenes=(
            "机の上の{x}", "雪の中の{x}", "水の中の{x}", "草の上の{x}", "夜の{x}", "海辺の{x}", "森の中の{x}",
            "白い背景の{x}", "日向の{x}", "街の{x}", "箱の中の{x}", "手の中の{x}", "窓辺の{x}", "宇宙の{x}",
            "雨の中の{x}", "山の上の{x}",
        ),
        pairs=(
            "{x}と{y}", "{x}の隣の{y}", "{x}の上の{y}", "{x}の中の{y}", "{x}や{y}", "{x}、{y}", "{x}のような{y}",
            "{x}の後ろの{y}",
        ),
    ),
    "ko": Phrases(
        modified=("{m} {x}",),
        modifiers=(
            "빨간", "파란", "초록색", "노란", "검은", "하얀", "분홍색", "보라색", "주황색", "갈색", "회색", "금색",
            "은색", "큰", "작은", "거대한", "귀여운", "아름다운", "부서진", "오래된", "새로운", "둥근", "네모난",
            "투명한", "빛나는", "나무로 만든", "금속", "유리", "돌로 만든", "알록달록한", "빈", "외로운", "행복한",
            "슬픈", "달리는", "자고 있는", "날아가는", "춤추는", "모자를 쓴", "안경을 쓴", "얼어붙은", "불타는",
            "젖은", "깨끗한", "더러운", "줄무늬", "웃는", "우는", "앉아 있는",
        ),
        pictures=(
            "{x} 사진", "{x} 그림", "{x} 아이콘", "{x} 일러스트", "{x} 스케치", "{x} 수채화", "{x} 클로즈업",
            "만화 {x}", "아이가 그린 {x}", "{x} 흑백 사진", "{x} 실루엣", "많은 {x}", "두 개의 {x}", "{x} 기호",
            "{x} 이모티콘",
        ),
        scenes=(
            "탁자 위의 {x}", "눈 속의 {x}", "물속의 {x}", "풀밭 위의 {x}", "밤의 {x}", "바닷가의 {x}", "숲속의 {x}",
            "흰 배경의 {x}", "햇빛 속의 {x}", "도시의 {x}", "상자 안의 {x}", "손 안의 {x}", "창가의 {x}",
            "우주의 {x}", "비 속의 {x}", "산 위의 {x}",
        ),
        pairs=(
            "{x} 그리고 {y}", "{x} 옆의 {y}", "{x} 위의 {y}", "{x} 안의 {y}", "{x}, {y}", "{x} 같은 {y}",
            "{x} 뒤의 {y}", "{x}{w} {y}",
        ),
    ),
}  # fmt: skip


def draw_phrase(phrases: Phrases, pools: Sequence[Sequence[Noun]], rng: random.Random) -> str:
    """A phrase of one or two nouns, each drawn from any of the pools."""
    kind = rng.random()
    first, second = (rng.choice(rng.choice(pools)) for _ in range(2))
    if kind < 0.35:
        ending = phrases.endings.get(first.gender, "")
        modifier = rng.choice(phrases.modifiers).replace("+", ending)
        return _fill(rng.choice(phrases.modified), first, second, modifier)
    frames = phrases.pictures if kind < 0.55 else phrases.scenes if kind < 0.7 else phrases.pairs
    return _fill(rng.choice(frames), first, second)


def _fill(frame: str, first: Noun, second: Noun, modifier: str = "") -> str:
    return frame.format(
        x=first.name,
        y=second.name,
        a=_with_article(first),
        b=_with_article(second),
        m=modifier,
        n=_article(modifier),
        w=_and_after(first.name),
    )


def _with_article(noun: Noun) -> str:
    """German nouns, which have a dative: "einem Hund". Others as in English: "a dog"."""
    if noun.dative:
        return f"{'einer' if noun.gender == 'f' else 'einem'} {noun.dative}"
    return f"{_article(noun.name)} {noun.name}"


def _article(word: str) -> str:
    """The English article; of words in u-, "an umbrella" and "a unicorn"."""
    return "an" if re.match(r"[aeio]|u[lmnp](?!i)", word, re.IGNORECASE) else "a"


def _and_after(noun: str) -> str:
    """The Korean particle: 과 after a syllable that ends in a consonant, 와 after one that ends in a vowel."""
    syllable = ord(noun[-1]) - 0xAC00
    return "과" if 0 <= syllable < 11_172 and syllable % 28 else "와"
