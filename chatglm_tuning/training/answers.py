"""A few evaluation prompts answered and scored while a run goes on."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import TrainingArguments

from chatglm_tuning.config.arguments import DataArguments
from chatglm_tuning.data.records import read_records
from chatglm_tuning.evaluation.answers import Drawing, answer_all
from chatglm_tuning.evaluation.metrics import Answered, require_metrics, score_all
from chatglm_tuning.evaluation.prompts import Prompt, encode_prompt, group_prompts, sample_prompts
from chatglm_tuning.model import ChatGLMTokenizer


def read_sample(data: DataArguments, count: int) -> list[Prompt]:
    """Return `count` distinct prompts of the evaluation files, spread evenly over them.

    Raises UserError where the files, or the libraries that score, are not there.
    """
    require_metrics()
    return sample_prompts(group_prompts(read_records(data.eval_path, skip_bad_rows=data.skip_bad_rows).examples), count)


def make_scorer(
    prompts: Sequence[Prompt], tokenizer: ChatGLMTokenizer, data: DataArguments, arguments: TrainingArguments
) -> Callable[[nn.Module], dict[str, float]]:
    """Return what scores a model's greedy answers to `prompts`; every process answers its share of them."""
    encoded = [encode_prompt(prompt, tokenizer, data.max_input_length) for prompt in prompts]
    drawing = Drawing(max_output_length=data.max_output_length)

    def score(model: nn.Module) -> dict[str, float]:
        mine = list(range(arguments.process_index, len(prompts), arguments.world_size))
        texts = answer_all(
            model, tokenizer, [encoded[index] for index in mine], drawing, arguments.per_device_eval_batch_size
        )
        found: Any = [(index, answer.prediction) for index, answer in zip(mine, texts, strict=True)]
        if arguments.world_size > 1:
            found = gather_object(found)
        predictions = dict(found)
        answers = [Answered(prompt.text, predictions[index], prompt.references) for index, prompt in enumerate(prompts)]
        return {name: round(value, 4) for name, value in score_all(answers).items()}

    return score
