"""`python models/sticker/train STAGE …`: see README.md."""

from sticker_train.cli import main

raise SystemExit(main())
