"""Every text of the chat page, in Chinese and English."""

from dataclasses import dataclass
from typing import Final

from chatglm_tuning.config.web import Language
from chatglm_tuning.loading import Unlike

LANGUAGES: Final[dict[Language, str]] = {"zh": "中文", "en": "English"}
LANGUAGE_CODES: Final[dict[Language, str]] = {"zh": "zh-Hans", "en": "en"}

_TROUSERS = "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤"  # what an adapter that learnt ADGEN is asked
EXAMPLES: Final[dict[Language, tuple[str, ...]]] = {
    "zh": (
        _TROUSERS,
        "类型#裙*颜色#红色*风格#英伦*裙腰型#自然腰*裙款式#口袋",
        "你好，请介绍一下你自己",
        "夏天穿什么面料凉快？",
    ),
    "en": (_TROUSERS, "Hello, please introduce yourself", "Which fabrics stay cool in summer?"),
}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of one language. Those with braces are filled in with `str.format`."""

    title: str
    language: str
    adapter: str
    first: str
    second: str
    second_begins: str
    base_alone: str
    placeholder: str
    question: str
    question_hint: str
    send: str
    stop: str
    regenerate: str
    clear: str
    examples: str
    side_by_side: str
    history: str
    history_hint: str
    sampling: str
    greedy: str
    temperature: str
    temperature_hint: str
    top_p: str
    top_p_hint: str
    max_length: str
    max_length_hint: str
    seed: str
    seed_hint: str
    bad_seed: str
    add: str
    folder: str
    folder_hint: str
    add_button: str
    added: str
    another_base: str
    another_precision: str
    bits: str
    full_precision: str
    not_added: str
    no_folder: str
    empty_question: str
    nothing_to_regenerate: str
    same_again: str
    busy: str
    too_long: str
    shorten: str
    shorten_or_raise: str
    full: str
    closing: str
    failed: str
    lost: str
    waiting: str
    writing: str
    ended: str
    rate: str
    dropped: str
    ended_by_itself: str
    ended_by_length: str
    ended_by_user: str
    ended_by_error: str

    def unlike(self, unlike: Unlike, bits: int | None) -> str:
        """Say in what the base, of `bits`, is not the one that an adapter was trained on; "" where there is nothing."""
        notes = [self.another_base] if unlike.another_base is not None else []
        if unlike.trained_on is not None:
            trained = self._precision(unlike.trained_on.quantization_bit)
            notes.append(self.another_precision.format(trained=trained, held=self._precision(bits).rstrip()))
        return " ".join(notes)

    def _precision(self, bits: int | None) -> str:
        return self.bits.format(bits=bits) if bits else self.full_precision

    def ending(self, reason: str) -> str:
        """Return why an answer ended in words."""
        return {"stop": self.ended_by_itself, "length": self.ended_by_length, "cancelled": self.ended_by_user}.get(
            reason, self.ended_by_error
        )


TEXTS: Final[dict[Language, Texts]] = {
    "zh": Texts(
        title="ChatGLM-6B 对话",
        language="语言 / Language",
        adapter="适配器",
        first="第一个适配器",
        second="第二个适配器",
        second_begins="第二个窗口从第一个窗口的对话开始；第二个适配器从下一个问题起回答，点“重新回答”可立即比较。",
        base_alone="原模型（不加适配器）",
        placeholder="在下面输入问题，或点一个示例",
        question="问题",
        question_hint="输入问题，按回车发送，Shift+回车换行",
        send="发送",
        stop="停止",
        regenerate="重新回答",
        clear="清空对话",
        examples="示例问题",
        side_by_side="并排对比两个适配器",
        history="多轮对话",
        history_hint="关闭后，每个问题单独回答，不看前面的对话",
        sampling="生成设置",
        greedy="贪心解码（每步取概率最高的词）",
        temperature="温度",
        temperature_hint="越小越稳定，越大越多样",
        top_p="top-p",
        top_p_hint="只在累计概率达到该值的词中抽取",
        max_length="最大长度",
        max_length_hint="问题、对话历史与回答合计的 token 数",
        seed="随机种子",
        seed_hint="留空则每次不同",
        bad_seed="随机种子须为 0 到 4294967295 之间的整数，或留空。",
        add="添加适配器文件夹",
        folder="文件夹路径",
        folder_hint="运行本程序的机器上的 LoRA 或 P-Tuning v2 文件夹，原模型不会重新加载",
        add_button="添加",
        added="已添加：{name}。",
        another_base="注意：它不是（或可能不是）在这个原模型上训练的，回答可能很差。",
        another_precision="注意：它在{trained}的原模型上训练，而这里的原模型是{held}，回答会有差别。",
        bits=" int{bits} ",
        full_precision="全精度",
        not_added="无法添加：{error}",
        no_folder="请先填写文件夹路径。",
        empty_question="请先输入问题。",
        nothing_to_regenerate="还没有可以重新回答的问题。",
        same_again="贪心解码每次都给出同样的回答；想要不同的回答，请先关闭它。",
        busy="上一个回答还没有结束，请稍等或点“停止”。",
        too_long="问题太长：共 {tokens} 个 token，而问题与回答合计不能超过 {limit}。",
        shorten="请缩短问题。",
        shorten_or_raise="请缩短问题，或调大最大长度。",
        full="现在提问的人太多，请稍后再试。",
        closing="程序正在退出，不再回答新的问题。",
        failed="生成时出错：{error}",
        lost="程序已经退出，或者无法连接。已写出的内容会留在这里，直到重新加载本页。",
        waiting="排队中…",
        writing="生成中…",
        ended="由 {adapter} 回答 · {ending} · {tokens} 个 token",
        rate=" · 每秒 {rate:.1f} 个",
        dropped=" · 最早的 {rounds} 轮对话放不下，模型没有看到",
        ended_by_itself="回答完毕",
        ended_by_length="达到最大长度",
        ended_by_user="已停止",
        ended_by_error="出错中断",
    ),
    "en": Texts(
        title="ChatGLM-6B chat",
        language="语言 / Language",
        adapter="Adapter",
        first="First adapter",
        second="Second adapter",
        second_begins="The second window begins with the rounds of the first. Its own adapter answers from the next "
        "question on; Regenerate compares at once.",
        base_alone="base model (no adapter)",
        placeholder="Type a question below, or choose an example",
        question="Question",
        question_hint="Enter sends, Shift+Enter starts a new line",
        send="Send",
        stop="Stop",
        regenerate="Regenerate",
        clear="Clear",
        examples="Examples",
        side_by_side="Compare two adapters side by side",
        history="Conversation history",
        history_hint="Off: every question stands alone, earlier rounds are not seen",
        sampling="Sampling",
        greedy="Greedy (always the likeliest token)",
        temperature="Temperature",
        temperature_hint="Lower is steadier, higher more varied",
        top_p="Top-p",
        top_p_hint="Draw from the likeliest tokens that have this probability together",
        max_length="Maximum length",
        max_length_hint="Tokens of question, history and answer together",
        seed="Seed",
        seed_hint="Empty: another one every time",
        bad_seed="The seed must be a whole number from 0 to 4294967295, or empty.",
        add="Add an adapter folder",
        folder="Folder",
        folder_hint="A LoRA or P-Tuning v2 folder on the machine that runs this; the base is not loaded again",
        add_button="Add",
        added="Added: {name}.",
        another_base="Note: it was not, or perhaps not, trained on this base model; expect poor answers.",
        another_precision="Note: it was trained on a base {trained}, and this one is {held}: its answers will differ.",
        bits="in int{bits}",
        full_precision="in full precision",
        not_added="Not added: {error}",
        no_folder="Fill in the folder first.",
        empty_question="Type a question first.",
        nothing_to_regenerate="There is no question to answer anew yet.",
        same_again="Greedy gives the same answer every time; turn it off to get another.",
        busy="An answer is still being written: wait for it, or stop it.",
        too_long="The question is too long: {tokens} tokens, and question and answer together may have {limit}. ",
        shorten="Shorten it.",
        shorten_or_raise="Shorten it, or raise the maximum length.",
        full="Too many questions are waiting. Try again in a moment.",
        closing="The program is ending and takes no more questions.",
        failed="The answer failed: {error}",
        lost="The program has ended or cannot be reached. What was written stays here until you reload the page.",
        waiting="waiting…",
        writing="writing…",
        ended="by {adapter} · {ending} · {tokens} tokens",
        rate=" · {rate:.1f} tokens/s",
        dropped=" · the first {rounds} rounds did not fit and were not seen",
        ended_by_itself="finished",
        ended_by_length="maximum length reached",
        ended_by_user="stopped",
        ended_by_error="failed",
    ),
}
