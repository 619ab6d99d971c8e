"""Adapting as people know it: `fit` on a support with labels of any kind, `predict` on as many queries as there are."""

from jmeta.estimators.classifier import FewShotClassifier
from jmeta.estimators.policy import FewShotPolicy
from jmeta.estimators.regressor import FewShotRegressor
