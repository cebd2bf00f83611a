from .question_set import Question as Question
from .question_set import QuestionSet as QuestionSet
from .question_set import Wording as Wording
from .question_set import write_questions as write_questions
from .read import packaged_questions as packaged_questions
from .read import read_questions as read_questions
