"""The networks: a frozen teacher and the students that imitate it."""

from dskd.distances import Pyramid
from dskd.model.amplification import AmplifiedTeacher, Amplifier, build_amplifier
from dskd.model.embedding import DeepFeatureEmbedding
from dskd.model.network import StudentPyramids, Students, build_students
from dskd.model.students import StudentDecoder, StudentEncoder
from dskd.model.teacher import Teacher, TeacherUnavailableError, build_teacher, normalize, weights_fingerprint

__all__ = [
    "AmplifiedTeacher",
    "Amplifier",
    "DeepFeatureEmbedding",
    "Pyramid",
    "StudentDecoder",
    "StudentEncoder",
    "StudentPyramids",
    "Students",
    "Teacher",
    "TeacherUnavailableError",
    "build_amplifier",
    "build_students",
    "build_teacher",
    "normalize",
    "weights_fingerprint",
]
