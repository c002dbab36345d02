"""The stage `teacher_cache`: a teacher and tokens in, what the teacher says about each token out."""
