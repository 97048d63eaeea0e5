# The service for Jetsons: docs/containers.md. Build it on one, or with buildx for linux/arm64.
#   JetPack 6: docker build -f docker/jetpack.Dockerfile -t espmedsam-edge:jp6 .
#   JetPack 7: docker build -f docker/jetpack.Dockerfile -t espmedsam-edge:jp7 \
#       --build-arg BASE=nvcr.io/nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg CUDA_PYTHON="cuda-python>=13" .
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${BASE}
ARG CUDA_PYTHON="cuda-python>=12.6,<13"
# TensorRT's Python package is a system package there, so the virtual environment sees those.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN /usr/bin/python3 -m venv --system-site-packages --upgrade-deps /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir '.[video,serve,mqtt,objects]' ./packages/weights "${CUDA_PYTHON}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=all
RUN install --directory --owner=10001 --group=10001 --mode=700 /cache
USER 10001:10001
WORKDIR /tmp
VOLUME /cache
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["espmedsam-edge"]
CMD ["infer", "--serve", "0.0.0.0:8080"]
