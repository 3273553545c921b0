"""The benchmarks: where each comes from, under which terms, how it is asked and how it is scored. Data only.

Nothing here is shipped: a set is read from a local file, from the hub or from a prepared TFDS set. Columns are given as alternatives,
since mirrors rename them.
"""

from dataclasses import dataclass, field
from typing import Literal

Scorer = Literal["request", "gsm8k", "math", "choice", "code"]


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set."""

    name: str
    title: str
    group: Literal["safety", "overrefusal", "capability", ""]
    """The group of `--suite` it belongs to; empty where it is asked for by name only."""
    hub: str
    """Name on the Hugging Face hub, with its configuration; with several (`a+b`), each is a subtype."""
    split: str
    url: str
    """Where it comes from."""
    license: str
    size: int
    """Prompts asked."""
    files: tuple[tuple[str, ...], ...]
    """Names of local files, alternatives in order; all files of an alternative are read."""
    columns: dict[str, tuple[str, ...]]
    """Role -> names of the column, alternatives in order."""
    scorer: Scorer
    label: Literal["harmful", "benign"]
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Role -> values a row must have; other rows belong to another benchmark."""
    prompt: str = "{prompt}"
    """How the question is put to the model."""
    room: int = 512
    """Tokens for the response, unless --max-new-tokens says otherwise."""
    gated: bool = False
    """The hub asks for a login and for its terms to be accepted."""
    subsets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Named unions of subtypes, for NAME:SUBSET."""
    note: str = ""

    @property
    def metric(self) -> str:
        """Name of its rate in results: attack success, over-refusal, or accuracy."""
        return {"harmful": f"asr_{self.name}", "benign": f"over_refusal_{self.name}"}[self.label] if self.scorer == "request" else self.name


BOXED = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = "{prompt}\n\n{options}\n\nAnswer with the letter of the right option."
REASONED = "{prompt}\n\n{options}\n\nThink step by step, then end with one line: The answer is (X), where X is the right letter."
CODE = "Complete the following Python function. Answer with the whole function in one Python code block.\n\n```python\n{prompt}```"
CODE_TESTS = "{prompt}\n\nYour code should pass these tests:\n\n{tests}\n\nAnswer with one Python code block."

STEM = (
    *("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science", "college_mathematics"),
    *("college_physics", "computer_security", "conceptual_physics", "electrical_engineering", "elementary_mathematics"),
    *("high_school_biology", "high_school_chemistry", "high_school_computer_science", "high_school_mathematics", "high_school_physics"),
    *("high_school_statistics", "machine_learning"),
)
"""MMLU's subjects of physics, chemistry, biology, computer science, mathematics and engineering (hendrycks/test, categories.py)."""

_HARMBENCH = {
    "prompt": ("Behavior", "prompt", "behavior"), "context": ("ContextString", "context"),
    "subtype": ("FunctionalCategory",), "category": ("SemanticCategory", "category"), "id": ("BehaviorID",),
}  # fmt: skip
_WILD = {"prompt": ("adversarial", "prompt"), "subtype": ("data_type",), "kind": ("data_type",)}
_MATHS = {"prompt": ("problem", "question", "Problem"), "answer": ("answer", "Answer"), "id": ("unique_id", "ID", "id")}

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "advbench", "AdvBench harmful behaviours", "safety", "walledai/AdvBench", "train",
            "https://github.com/llm-attacks/llm-attacks/blob/main/data/advbench/harmful_behaviors.csv", "MIT", 520,
            (("advbench/harmful_behaviors.csv",), ("harmful_behaviors.csv",), ("advbench.csv",), ("advbench.jsonl",)),
            {"prompt": ("goal", "prompt"), "target": ("target",)}, "request", "harmful", gated=True,
        ),
        Benchmark(
            "harmbench", "HarmBench text behaviours", "safety", "walledai/HarmBench:standard+contextual+copyright", "train",
            "https://github.com/centerforaisafety/HarmBench/tree/main/data/behavior_datasets", "MIT", 400,
            (
                ("harmbench/harmbench_behaviors_text_all.csv",), ("harmbench_behaviors_text_all.csv",),
                ("harmbench/harmbench_behaviors_text_test.csv", "harmbench/harmbench_behaviors_text_val.csv"),
                ("harmbench_behaviors_text_test.csv", "harmbench_behaviors_text_val.csv"), ("harmbench.jsonl",),
            ),
            _HARMBENCH, "request", "harmful", gated=True,
            note="subsets standard, contextual, copyright",
        ),
        Benchmark(
            "harmbench_val", "HarmBench validation behaviours, to choose checkpoints on", "", "walledai/HarmBench:standard", "train",
            "https://github.com/centerforaisafety/HarmBench/tree/main/data/behavior_datasets", "MIT", 80,
            (("harmbench/harmbench_behaviors_text_val.csv",), ("harmbench_behaviors_text_val.csv",)),
            _HARMBENCH, "request", "harmful", gated=True, note="local file only: the hub mirror has no such split",
        ),
        Benchmark(
            "strongreject", "StrongREJECT forbidden prompts", "safety", "walledai/StrongREJECT", "train",
            "https://github.com/alexandrasouly/strongreject/blob/main/strongreject_dataset/strongreject_dataset.csv", "MIT", 313,
            (("strongreject/strongreject_dataset.csv",), ("strongreject_dataset.csv",), ("strongreject.jsonl",)),
            {"prompt": ("forbidden_prompt", "prompt"), "category": ("category",)}, "request", "harmful", gated=True,
            note="judge of the paper: --judge endpoint:strongreject",
        ),
        Benchmark(
            "jailbreakbench", "JailbreakBench behaviours", "safety", "JailbreakBench/JBB-Behaviors:behaviors", "harmful",
            "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors", "MIT", 100,
            (("jailbreakbench/harmful-behaviors.csv",), ("harmful-behaviors.csv",), ("jailbreakbench.jsonl",)),
            {"prompt": ("Goal", "goal"), "category": ("Category", "category")}, "request", "harmful",
        ),
        Benchmark(
            "simplesafetytests", "SimpleSafetyTests", "safety", "Bertievidgen/SimpleSafetyTests", "test",
            "https://huggingface.co/datasets/Bertievidgen/SimpleSafetyTests", "CC-BY-2.0", 100,
            (("simplesafetytests/sst_test_cases.csv",), ("sst_test_cases.csv",), ("simplesafetytests.jsonl",)),
            {"prompt": ("prompt",), "category": ("harm_area",), "id": ("id",)}, "request", "harmful",
        ),
        Benchmark(
            "wildjailbreak", "WildJailbreak evaluation set, adversarial harmful", "safety", "allenai/wildjailbreak:eval", "train",
            "https://huggingface.co/datasets/allenai/wildjailbreak", "ODC-BY-1.0", 2000,
            (("wildjailbreak/eval/eval.tsv",), ("wildjailbreak/eval.tsv",), ("wildjailbreak.jsonl",)),
            _WILD, "request", "harmful", {"kind": ("adversarial_harmful",)}, gated=True,
        ),
        Benchmark(
            "sorrybench", "SORRY-Bench, base prompts", "safety", "sorry-bench/sorry-bench-202503", "train",
            "https://huggingface.co/datasets/sorry-bench/sorry-bench-202503", "SORRY-Bench license (research)", 440,
            (("sorrybench/question.jsonl",), ("sorrybench.jsonl",)),
            {"prompt": ("turns", "prompt"), "category": ("category",), "kind": ("prompt_style",), "id": ("question_id",)},
            "request", "harmful", {"kind": ("base",)}, gated=True,
        ),
        Benchmark(
            "saferlhf", "PKU-SafeRLHF test prompts whose two given answers are both unsafe", "safety",
            "PKU-Alignment/PKU-SafeRLHF:default", "test",
            "https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF", "CC-BY-NC-4.0", 0,
            (("saferlhf/test.jsonl",), ("saferlhf.jsonl",)),
            {"prompt": ("prompt",), "kind": ("is_response_0_safe",), "kind2": ("is_response_1_safe",)},
            "request", "harmful", {"kind": ("false",), "kind2": ("false",)}, note="repeated prompts are asked once",
        ),
        Benchmark(
            "harmfulqa", "HarmfulQA", "safety", "declare-lab/HarmfulQA", "train",
            "https://huggingface.co/datasets/declare-lab/HarmfulQA", "Apache-2.0", 1960,
            (("harmfulqa/data_for_hub.jsonl",), ("harmfulqa.jsonl",)),
            {"prompt": ("question",), "category": ("topic",), "id": ("id",)}, "request", "harmful",
            note="the hub's file is one JSON list: save it as JSON lines",
        ),
        Benchmark(
            "xstest", "XSTest, safe prompts", "overrefusal", "walledai/XSTest", "test",
            "https://github.com/paul-rottger/xstest", "CC-BY-4.0", 250,
            (("xstest/xstest_prompts.csv",), ("xstest_prompts.csv",), ("xstest.jsonl",)),
            {"prompt": ("prompt",), "kind": ("label",), "subtype": ("type",), "id": ("id",)}, "request", "benign", {"kind": ("safe",)},
            gated=True,
        ),
        Benchmark(
            "xstest_unsafe", "XSTest, unsafe contrasts", "", "walledai/XSTest", "test",
            "https://github.com/paul-rottger/xstest", "CC-BY-4.0", 200,
            (("xstest/xstest_prompts.csv",), ("xstest_prompts.csv",), ("xstest.jsonl",)),
            {"prompt": ("prompt",), "kind": ("label",), "subtype": ("type",), "id": ("id",)}, "request", "harmful", {"kind": ("unsafe",)},
            gated=True,
        ),
        Benchmark(
            "orbench", "OR-Bench hard", "overrefusal", "bench-llm/or-bench:or-bench-hard-1k", "train",
            "https://huggingface.co/datasets/bench-llm/or-bench", "CC-BY-4.0", 1319,
            (("orbench/or-bench-hard-1k.csv",), ("or-bench-hard-1k.csv",), ("orbench.jsonl",)),
            {"prompt": ("prompt",), "category": ("category",)}, "request", "benign",
        ),
        Benchmark(
            "wildbenign", "WildJailbreak evaluation set, adversarial benign", "overrefusal", "allenai/wildjailbreak:eval", "train",
            "https://huggingface.co/datasets/allenai/wildjailbreak", "ODC-BY-1.0", 210,
            (("wildjailbreak/eval/eval.tsv",), ("wildjailbreak/eval.tsv",), ("wildjailbreak.jsonl",)),
            _WILD, "request", "benign", {"kind": ("adversarial_benign",)}, gated=True,
        ),
        Benchmark(
            "jailbreakbench_benign", "JailbreakBench benign look-alikes", "overrefusal", "JailbreakBench/JBB-Behaviors:behaviors", "benign",
            "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors", "MIT", 100,
            (("jailbreakbench/benign-behaviors.csv",), ("benign-behaviors.csv",), ("jailbreakbench_benign.jsonl",)),
            {"prompt": ("Goal", "goal"), "category": ("Category", "category")}, "request", "benign",
        ),
        Benchmark(
            "gsm8k", "GSM8K test", "capability", "openai/gsm8k:main", "test", "https://github.com/openai/grade-school-math", "MIT", 1319,
            (("gsm8k/test.jsonl",), ("gsm8k.jsonl",)),
            {"prompt": ("question",), "answer": ("answer",)}, "gsm8k", "benign", prompt=BOXED, room=1024,
        ),
        Benchmark(
            "math500", "MATH-500", "capability", "HuggingFaceH4/MATH-500", "test", "https://github.com/openai/prm800k", "MIT", 500,
            (("math500/test.jsonl",), ("math500.jsonl",)),
            _MATHS | {"subtype": ("subject",)}, "math", "benign", prompt=BOXED, room=4096,
        ),
        Benchmark(
            "aime24", "AIME 2024", "capability", "HuggingFaceH4/aime_2024", "train",
            "https://huggingface.co/datasets/HuggingFaceH4/aime_2024", "problems: MAA; see the set's page", 30,
            (("aime24/test.jsonl",), ("aime24.jsonl",)), _MATHS, "math", "benign", prompt=BOXED, room=16384,
        ),
        Benchmark(
            "aime25", "AIME 2025", "capability", "math-ai/aime25", "test",
            "https://huggingface.co/datasets/math-ai/aime25", "problems: MAA; see the set's page", 30,
            (("aime25/test.jsonl",), ("aime25.jsonl",)), _MATHS, "math", "benign", prompt=BOXED, room=16384,
        ),
        Benchmark(
            "gpqa", "GPQA Diamond", "capability", "Idavidrein/gpqa:gpqa_diamond", "train",
            "https://huggingface.co/datasets/Idavidrein/gpqa", "CC-BY-4.0", 198,
            (("gpqa/gpqa_diamond.csv",), ("gpqa_diamond.csv",), ("gpqa.jsonl",)),
            {
                "prompt": ("Question",), "right": ("Correct Answer",), "wrong1": ("Incorrect Answer 1",),
                "wrong2": ("Incorrect Answer 2",), "wrong3": ("Incorrect Answer 3",),
                "subtype": ("High-level domain",), "id": ("Record ID",),
            },
            "choice", "benign", prompt=REASONED, room=4096, gated=True, note="options in an order fixed by the question",
        ),
        Benchmark(
            "mmlu", "MMLU", "capability", "cais/mmlu:all", "test", "https://github.com/hendrycks/test", "MIT", 14042,
            (("mmlu/test.parquet",), ("mmlu/test.jsonl",), ("mmlu.jsonl",)),
            {"prompt": ("question",), "options": ("choices",), "answer": ("answer",), "subtype": ("subject",)},
            "choice", "benign", prompt=CHOICE, room=16, subsets={"stem": STEM},
            note="by likelihood of the letters; subsets: stem, or a subject",
        ),
        Benchmark(
            "humaneval", "HumanEval", "capability", "openai/openai_humaneval", "test", "https://github.com/openai/human-eval", "MIT", 164,
            (("humaneval/HumanEval.jsonl.gz",), ("humaneval/HumanEval.jsonl",), ("HumanEval.jsonl.gz",), ("humaneval.jsonl",)),
            {"prompt": ("prompt",), "tests": ("test",), "entry_point": ("entry_point",), "id": ("task_id",)},
            "code", "benign", prompt=CODE, room=1024, note="needs --allow-code-execution",
        ),
        Benchmark(
            "mbpp", "MBPP sanitized", "capability", "google-research-datasets/mbpp:sanitized", "test",
            "https://github.com/google-research/google-research/tree/master/mbpp", "CC-BY-4.0", 257,
            (("mbpp/test.jsonl",), ("mbpp.jsonl",)),
            {"prompt": ("prompt", "text"), "tests": ("test_list",), "imports": ("test_imports",), "id": ("task_id",)},
            "code", "benign", prompt=CODE_TESTS, room=1024, note="needs --allow-code-execution",
        ),
    )
}  # fmt: skip

OPTIONAL = frozenset({"id", "category", "subtype", "context", "target", "imports"})
"""Roles a file may lack."""
GROUPS = ("safety", "overrefusal", "capability", "attacks")
