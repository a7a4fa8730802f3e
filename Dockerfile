# The web demo in a container, with PyTorch for the CPU:
#   docker build -t skin_lesions . && docker run --rm -p 127.0.0.1:7860:7860 skin_lesions
FROM python:3.11-slim
# what OpenCV loads, which reads and changes images
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir '/src[app]' && rm -rf /src
RUN useradd --create-home --home-dir /app app
USER app
WORKDIR /app
EXPOSE 7860
# the first process of a container ignores SIGTERM; the command ends with Ctrl-C
STOPSIGNAL SIGINT
CMD ["skin_lesions", "app", "--host", "0.0.0.0", "--no-browser"]
