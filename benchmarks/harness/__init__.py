"""What every suite shares: evaluation, fine-tuning, methods, search with equal trials, and tables."""
