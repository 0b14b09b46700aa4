# ruff: noqa: E501 (tables of rows)
"""Chat templates of our own with the quirks of those that today's models bring.

Each is (template, special tokens, names of some of them).
"""

from __future__ import annotations

from typing import Any

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = """\
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}{{- raise_exception('system comes first') }}{%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# A date, functions in the first user turn, one call a turn with an end of its own, results as JSON.
LLAMA3 = """\
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set f = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|python_tag|>{"name": "' + f.name + '", ' }}
        {{- '"parameters": ' + (f.arguments | tojson) + '}<|eom_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
        {%- if tools and loop.first %}{%- for t in tools %}{{- (t | tojson) + '\\n\\n' }}{%- endfor %}{%- endif %}
        {{- (m.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# A system text of its own where there is none; results stand in a user's turn.
QWEN25 = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + ('' if m.tool_calls and not m.content else '\\n' + m.content) }}
        {%- for c in m.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Reasoning is kept behind the last question alone.
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set text = m.content %}{%- set thought = '' %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
        {%- else %}{{- text }}{%- endif %}
        {%- for c in m.tool_calls or [] %}
            {%- if text or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
            {{- (c.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}
    {%- elif opens is defined %}{{- '<think>\\n' }}{%- endif %}
{%- endif %}"""
# The same, and the generation prompt opens the block.
QWEN35 = QWEN3.replace("{%- elif opens is defined %}", "{%- else %}")

# The system text stands in the first question; no head, and what asks is what closes the question.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{%- set ns.system = m.content + '\\n\\n' %}
    {%- elif m.role == 'user' %}{{- '[INST] ' + ns.system + m.content + ' [/INST]' }}{%- set ns.system = '' %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant roles') }}{%- endif %}
{%- endfor %}"""
# Each call needs an id of nine characters, a result the id of its call, and answers must not follow each other.
MISTRAL_TOOLS = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}
        {%- if not messages[loop.index0 - 1].tool_calls %}{{- raise_exception('no call') }}{%- endif %}
        {{- '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for c in m.tool_calls %}
            {%- if c.id | length != 9 %}{{- raise_exception('nine characters') }}{%- endif %}
            {{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}"""
# The system text stands in the last turn, if that is the user's: nobody sees it once the answer is there.
MISTRAL_LATE = """\
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + ' ' + m.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- elif m.tool_calls %}
        {%- set call = m.tool_calls[0] %}
        {%- if call.id | length != 9 %}{{- raise_exception('ids of nine characters') }}{%- endif %}
        {{- '[TOOL_CALLS] [{"name": ' + (call.function.name | tojson) + ', "id": "' + call.id + '"}]' + eos_token }}
    {%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""
MISTRAL_STRICT = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}{{- m.content + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant roles') }}{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- (m.content | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI4 = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}"""

# A conversation that nothing is asked in ends with a token more.
PHI3 = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Every think block is cut out, and the generation prompt opens one. Arguments are added as a text; calls beside
# any content make two turns; an answer behind a result has no head.
DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- elif m.role == 'tool' %}{{- '<|out|>' + m.content }}
    {%- endif %}
    {%- for c in m.tool_calls or [] %}
        {{- '<|Assistant|><|call|>' + c.function.name + c.function.arguments + '<|end|>' }}
    {%- endfor %}
    {%- if m.role == 'assistant' and m.content is not none %}
        {{- ('' if loop.previtem is defined and loop.previtem.role == 'tool' else '<|Assistant|>') }}
        {{- m.content.split('</think>')[-1].lstrip('\\n') + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

# No token ends a turn: the next one begins. A think block is always there.
GLM = """\
{{- '<sop>' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\\n<think>' + (m.reasoning_content or '') + '</think>\\n' + m.content }}
        {%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name + '</call>' }}{%- endfor %}
    {%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# Channels; the last answer ends with another token than those before it.
GPT_OSS = """\
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.tool_calls %}
            {{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
            {{- '<|channel|>commentary json<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if m.thinking %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
        {%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}
    {%- elif m.role in ('system', 'developer') %}
        {{- '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}
    {%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# Says what the assistant writes, the head and the line end with it; a mode in the system turn.
SMOLLM3 = """\
{%- set mode = '/no_think' if enable_thinking is defined and enable_thinking is false else '/think' %}
{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %B %Y') + '\\nReasoning: ' + mode + '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {% generation %}
        {%- if mode == '/think' %}{{- '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- elif m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{%- if mode == '/no_think' %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}"""

LLAMA_MARKS = (
    "<|begin|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
OSS_MARKS = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>")
END: dict[str, str] = {"eos_token": "<|im_end|>"}
S: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}
Quirk = tuple[str, tuple[str, ...], dict[str, Any]]
TEMPLATES: dict[str, Quirk] = {
    "chatml": (CHATML, IM, {"eos_token": "<|endoftext|>"}),
    "llama3": (LLAMA3, LLAMA_MARKS, {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}),
    "qwen2.5": (QWEN25, (*IM, "<tool_call>", "</tool_call>"), END),
    "qwen3": (QWEN3, (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>"), END),
    "qwen3.5": (QWEN35, (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>"), END),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), S),
    "mistral tools": (MISTRAL_TOOLS, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), S),
    "mistral late": (MISTRAL_LATE, ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                                    "[/TOOL_RESULTS]"), S),
    "mistral strict": (MISTRAL_STRICT, ("<s>", "</s>"), S),
    "gemma": (GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "phi4": (PHI4, (*IM, "<|im_sep|>"), END),
    "phi3": (PHI3, ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), {"eos_token": "<|endoftext|>"}),
    "deepseek": (DEEPSEEK, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>", "<think>", "</think>", "<|out|>",
                              "<|call|>"), {"bos_token": "<|begin|>", "eos_token": "<|end|>"}),
    "glm": (GLM, ("<sop>", "<|user|>", "<|assistant|>", "<|tool|>", "<think>", "</think>", "<call>", "</call>", "<|eos|>"),
            {"eos_token": "<|eos|>"}),
    "gpt-oss": (GPT_OSS, OSS_MARKS, {"eos_token": "<|return|>"}),
    "smollm3": (SMOLLM3, IM, END),
    "none": (None, ("<s>", "</s>"), {"eos_token": "</s>"}),
}  # fmt: skip
