"""The versions, alone in a file so that `resta --version` and the build read them without importing anything."""

VERSION = "0.1.0"
# The number of the code that decides the bytes of a merge, raised with every change to what any recipe's bytes are or
# to what the journal of an unfinished merge says: what one number began, another does not finish.
MERGE_CODE = 1
