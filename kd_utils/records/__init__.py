"""What did a trial leave behind, and what was it made from?"""
