"""What Triton's Python backend loads; the work is done in services.policy.triton_model."""

import locale


class TritonPythonModel:
    def initialize(self, args):
        # The stub's locale is ASCII whatever the environment says, and torch then fails to read its own files.
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        # Here and not above: Triton may start this file just to complete the configuration, without need of torch.
        from services.policy.triton_model import PolicyModel

        self._model = PolicyModel(args["model_config"])

    def execute(self, requests):
        self._model.accept(requests)

    def finalize(self):
        self._model.close()
