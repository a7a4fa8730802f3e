"A Hugging Face Space: `python app.py` serves the app on all addresses, as the Space's proxy needs it."
import os

from skin_lesions.app import launch_app

MODEL = 'ham10000' # name of a bundle that comes with the package, or the folder of another

if __name__ == '__main__':
    launch_app(os.environ.get('MODEL', MODEL), host='0.0.0.0', port=int(os.environ.get('GRADIO_SERVER_PORT', 7860)))
