# Triton with the models of the weights that ship: docs/triton.md. With bundles of yours: put them into bundles/ and
# name them in BUNDLES: --build-arg BUNDLES="bundles/fundus.bundle bundles/ultrasound.bundle"
#   docker build -f docker/triton.Dockerfile -t espmedsam-triton .
ARG BASE=nvcr.io/nvidia/tritonserver:25.08-py3

FROM ${BASE}
ARG BUNDLES=all.bundle
WORKDIR /src
COPY . .
# Into the system's Python, which is Triton's; its stub is made for NumPy 1.
RUN python3 -m pip install --no-cache-dir --break-system-packages 'numpy<2' . ./packages/weights
# hadolint ignore=SC2086
RUN espmedsam-edge weights --out all.bundle \
    && espmedsam-edge deploy triton ${BUNDLES} --engine onnxruntime --out /models
ENV XDG_CACHE_HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1
RUN install --directory --owner=10001 --group=10001 --mode=700 /cache
USER 10001:10001
WORKDIR /tmp
VOLUME /cache
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["tritonserver"]
CMD ["--model-repository=/models"]
