"""Templates of questions whose answers are computed, by type and difficulty: `TEMPLATES["math"]["easy"]`.

A template is a function that draws numbers, names and wordings from a `random.Random`, and returns a question with its
answer and the steps that lead to it. The package uses the standard library only, and nothing of `tunix_torch`.
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
