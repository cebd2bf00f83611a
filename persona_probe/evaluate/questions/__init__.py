"""Question sets: read published formats and our own, with one content hash for every result."""

from persona_probe.evaluate.questions.question_set import Asked, Question, QuestionSet, write_questions
from persona_probe.evaluate.questions.read import packaged_questions, read_questions

__all__ = ["Asked", "Question", "QuestionSet", "packaged_questions", "read_questions", "write_questions"]
