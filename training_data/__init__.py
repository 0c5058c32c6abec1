"""Templates of questions whose answers are computed: `TEMPLATES[type][difficulty]`, functions of a `random.Random`.

Pure standard library, like `rewards`; imports nothing of the library above it.
"""

from training_data import code_questions, common_sense_questions, logic_questions, math_questions, science_questions
from training_data.question import Question, Template

__all__ = ["DIFFICULTIES", "TEMPLATES", "Question", "Template"]

DIFFICULTIES = ("easy", "medium", "hard")
TEMPLATES: dict[str, dict[str, tuple[Template, ...]]] = {
    "math": math_questions.TEMPLATES,
    "logic": logic_questions.TEMPLATES,
    "science": science_questions.TEMPLATES,
    "common_sense": common_sense_questions.TEMPLATES,
    "code": code_questions.TEMPLATES,
}
