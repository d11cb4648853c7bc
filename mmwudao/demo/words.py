"""Every word of the page, in Chinese and in English."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["zh", "en"]
Reason = Literal[
    "no_prompt", "no_picture", "not_a_picture", "too_large", "one_query", "no_description", "no_language",
    "no_question", "failed"
]


@dataclass(frozen=True)
class Words:
    """What the page says in one language. Braces are filled in."""

    language: Language
    name: str  # of the language
    lead: str
    examples: str
    download: str
    prompt: str
    prompt_hint: str
    style: str
    any_style: str
    seed: str
    seed_hint: str
    count: str
    candidates: str
    candidates_info: str
    fine_tuning: str
    stop: str
    stopped: str
    drawing: str  # a share in per cent
    results: str
    drawn: str
    cut: str  # a prompt, after what was read
    picture: str
    drop: str  # in the empty picture field

    draw: str
    draw_lead: str

    search: str
    search_lead: str
    look_for: str
    look_for_hint: str
    or_picture: str
    family: str
    all_families: str
    own_family: str
    where: str
    where_info: str
    how_many: str
    found: str
    found_nothing: str
    nothing_near: str
    show_scores: str
    not_shown: str
    add_title: str
    add_description: str
    add_hint: str
    add: str
    added: str

    caption: str
    caption_lead: str
    languages: str
    describe: str
    described: str

    ask: str
    ask_lead: str
    questions: str
    questions_hint: str

    complete: str
    complete_lead: str
    keep: str
    keep_top: str
    keep_left: str
    share: str
    completed: str

    upscale: str
    upscale_lead: str
    enlarge: str
    before_after: str
    enlarged: str

    # Option of `SamplingOptions` -> its label and its explanation. What is not here is said by the option's own help.
    sampling: dict[str, tuple[str, str]]
    refusals: dict[Reason, str]
    draw_examples: tuple[tuple[str, str], ...]  # prompt, style ("": any)
    search_examples: tuple[str, ...]
    complete_examples: tuple[str, ...]  # the prompts of `tabs.COMPLETED`


# the languages that models describe pictures in, as their speakers call them
LANGUAGE_NAMES = {
    "zh": "中文",
    "en": "English",
    "fr": "français",
    "de": "Deutsch",
    "cs": "čeština",
    "ja": "日本語",
    "ko": "한국어",
}

ZH = Words(
    language="zh",
    name="中文",
    lead="文字与图片互相生成、互相检索——模型 **{model}** 就在这台机器上运行。",
    examples="示例（点一下就会填入）",
    download="下载",
    prompt="画什么",
    prompt_hint="任意一种语言，例如：红心",
    style="画风",
    any_style="不限",
    seed="随机种子",
    seed_hint="每次不同",
    count="要几张",
    candidates="从几张候选里挑",
    candidates_info="先多画一些，再留下最符合文字的",
    fine_tuning="微调",
    stop="停止",
    stopped="已停止。",
    drawing="正在画… {percent}%",
    results="结果",
    drawn="画好了 {count} 张。每个 PNG 里都有配方：`mmwudao replay 图片.png` 可以原样重画。",
    cut="文字太长：模型只读到“{read}”为止。",
    picture="图片",
    drop="# 拖到这里，或点击选择",
    draw="画图",
    draw_lead="写一句话，模型一行一行地把它画出来。",
    search="搜图",
    search_lead="用一句话或一张图片，在 {count} 张图片里找最相近的。",
    look_for="找什么",
    look_for_hint="例如：动物",
    or_picture="或者用图片找",
    family="图片系列",
    all_families="全部",
    own_family="我添加的",
    where="更多条件",
    where_info="例如：concept = '1f98a' OR licence = 'MIT'",
    how_many="最多几张",
    found="找到 {count} 张，最相近的在前。",
    found_nothing="没有符合条件的图片。",
    nothing_near="没有相近的图片：下面是最接近的，但毫不相关的图片也能有这样的得分。",
    show_scores="显示得分",
    not_shown="另有 {count} 项的图片不在这台机器上。",
    add_title="把自己的图片加进来",
    add_description="说明（可选）",
    add_hint="例如：我家的猫",
    add="加入图库",
    added="已加入，现在共有 {count} 张。",
    caption="描述",
    caption_lead="给一张图片，用七种语言说出它是什么。",
    languages="语言",
    describe="描述",
    described="用了 {count} 种语言。",
    ask="问答",
    ask_lead="给一张图片，提出问题，模型来回答。",
    questions="问题",
    questions_hint="每行一个，例如：这是什么颜色？",
    complete="补全",
    complete_lead="保留图片的上半或左半，其余的由模型接着画。",
    keep="保留",
    keep_top="上边",
    keep_left="左边",
    share="保留的比例",
    completed="补全了 {count} 张。PNG 里记着提示词、种子和保留的部分。",
    upscale="放大",
    upscale_lead="把图片放大到两倍；拖动分界线，比较前后。",
    enlarge="放大",
    before_after="左：拉伸　右：放大",
    enlarged="{before} → {after} 像素。PNG 里记着所用的模型。",
    sampling={
        "guidance": ("引导强度", "越大越贴近文字；1 表示不引导"),
        "temperature": ("温度", "越低越保守；0 表示总取最可能的"),
        "top_k": ("Top-k", "只从最可能的 k 个编码中选；0 表示不限"),
        "top_p": ("Top-p", "只从合计达到这个概率的最可能的编码中选；0 表示不限"),
        "min_p": ("Min-p", "去掉概率低于最可能编码这一比例的编码；0 表示不去掉"),
        "window": ("窗口", "一次试画这么多个编码：图片不变，有时更快"),
    },
    refusals={
        "no_prompt": "还没有文字：请写一句话。",
        "no_picture": "还没有图片：请先选一张。",
        "not_a_picture": "这不是能读的图片：请用 PNG、JPEG、WebP、GIF、BMP 或 TIFF。",
        "too_large": "图片太大：请先缩小。",
        "one_query": "请写一句话，或者选一张图片——两者选一。",
        "no_description": "说明太长：最多 1000 个字符。",
        "no_language": "请至少选一种语言。",
        "no_question": "请写下一个问题。",
        "failed": "出了意外，服务器的日志里有详情。",
    },
    draw_examples=(
        ("戴墨镜的笑脸", "noto"),
        ("红心", "twemoji"),
        ("举手的女人: 中等肤色", "fluent-emoji-flat"),
        ("绿色圆", ""),
        ("月亮和星星", "openmoji"),
    ),
    search_examples=("动物", "笑脸", "骑自行车的人", "吃的东西", "红色的东西"),
    complete_examples=("大笑", "前台女", "橙色圆"),
)

EN = Words(
    language="en",
    name="English",
    lead="Text to pictures, pictures to text: the model **{model}** runs on this very machine.",
    examples="Examples (a click fills them in)",
    download="Download",
    prompt="What to draw",
    prompt_hint="In any language, for example: a red heart",
    style="Style",
    any_style="any",
    seed="Seed",
    seed_hint="a new one each time",
    count="Pictures",
    candidates="Choose them from",
    candidates_info="Draws so many and keeps those that show the prompt best",
    fine_tuning="Fine tuning",
    stop="Stop",
    stopped="Stopped.",
    drawing="drawing … {percent} %",
    results="Results",
    drawn="{count} drawn. Each PNG holds its recipe: `mmwudao replay PICTURE.png` draws it again, pixel by pixel.",
    cut="The prompt is too long: the model has read it up to “{read}”.",
    picture="Picture",
    drop="# Drop a picture here, or click",
    draw="Draw",
    draw_lead="Write a sentence, and watch the model draw it row by row.",
    search="Search",
    search_lead="Find the nearest of {count} pictures by a sentence or by another picture.",
    look_for="Look for",
    look_for_hint="for example: animals",
    or_picture="or search by a picture",
    family="Family",
    all_families="all",
    own_family="added by you",
    where="More conditions",
    where_info="for example: concept = '1f98a' OR licence = 'MIT'",
    how_many="At most",
    found="{count} found, the nearest first.",
    found_nothing="No picture fits these conditions.",
    nothing_near="Nothing here is near: these are the nearest, with scores that unrelated pictures reach by chance.",
    show_scores="Show scores",
    not_shown="{count} more have no picture on this machine.",
    add_title="Add a picture of your own",
    add_description="Description (if you like)",
    add_hint="for example: our cat",
    add="Add to the collection",
    added="Added: there are {count} pictures now.",
    caption="Describe",
    caption_lead="Give a picture, and read what it shows in seven languages.",
    languages="Languages",
    describe="Describe",
    described="Described in {count} languages.",
    ask="Ask",
    ask_lead="Give a picture, ask about it, and the model answers.",
    questions="Questions",
    questions_hint="One a line, for example: what colour is it?",
    complete="Complete",
    complete_lead="Keep the top or the left of a picture, and let the model draw the rest.",
    keep="Keep",
    keep_top="the top",
    keep_left="the left",
    share="Share",
    completed="Completed {count} times. The PNGs tell the prompt, the seed and what was kept.",
    upscale="Enlarge",
    upscale_lead="Twice the size; move the divider to compare.",
    enlarge="Enlarge",
    before_after="left: stretched, right: enlarged",
    enlarged="{before} → {after} pixels. The PNG tells which model did it.",
    sampling={
        "guidance": ("Guidance", "Higher follows the prompt more strictly; 1 is off"),
        "temperature": ("Temperature", "Lower is more cautious; 0 always takes the likeliest code"),
        "top_k": ("Top-k", "Samples from the k likeliest codes only; 0 is off"),
        "top_p": ("Top-p", "Samples from the likeliest codes that together have this probability; 0 is off"),
        "min_p": ("Min-p", "Leaves out codes less likely than this share of the likeliest one; 0 is off"),
        "window": ("Window", "Tries this many codes in one pass: the same picture, sometimes sooner"),
    },
    refusals={
        "no_prompt": "There is no text yet: write a sentence.",
        "no_picture": "There is no picture yet: choose one.",
        "not_a_picture": "This cannot be read as a picture: give a PNG, JPEG, WebP, GIF, BMP or TIFF.",
        "too_large": "The picture is too large: make it smaller first.",
        "one_query": "Write a sentence or choose a picture: one of the two.",
        "no_description": "The description is too long: at most 1000 characters.",
        "no_language": "Choose at least one language.",
        "no_question": "Write a question.",
        "failed": "Something unexpected went wrong; the server's log tells more.",
    },
    draw_examples=(
        ("smiling face with sunglasses", "noto"),
        ("red heart", "twemoji"),
        ("woman raising hand: medium skin tone", "fluent-emoji-flat"),
        ("green circle", ""),
        ("ein schlafendes Gesicht", "openmoji"),
    ),
    search_examples=("animals", "happy face", "someone on a bicycle", "food", "un cœur rouge"),
    complete_examples=("grinning face with smiling eyes", "woman tipping hand", "orange circle"),
)

WORDS: dict[Language, Words] = {"zh": ZH, "en": EN}
