"""Studies: many methods x tasks x settings x seeds, trained at equal budget and scored alike.

``spec`` says what a study is, ``methods`` what can be compared, ``cell`` trains and scores one point of the grid,
``runner`` goes through all of them, ``table`` collects what came out. Importing the package loads neither torch nor
Optuna.
"""

from bayeslora.study.spec import Study, TaskSpec

__all__ = ["Study", "TaskSpec"]
