"""The stage `teacher_cache`: a teacher and tokens in, the teacher's distribution of each token out."""
