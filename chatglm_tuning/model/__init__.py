"""The native ChatGLM-6B; importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from chatglm_tuning.model.configuration import ChatGLMConfig
from chatglm_tuning.model.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_tuning.model.prefix import PrefixEncoder
from chatglm_tuning.model.tokenization import ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer", "PrefixEncoder"]

AutoConfig.register("chatglm", ChatGLMConfig)
# The released config maps AutoModel to the model with its head, and users' scripts rely on it.
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    _auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer)
