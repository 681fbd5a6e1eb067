"""The demo in the browser, for hosts that start a script: `varaccel app` with the same options.

python app/app.py [--model NAME] [--port PORT] ...
"""

import sys

from varaccel.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["app"]
    main()
