"""Training-free methods that leave weights unread, as one family: methods.py has the table."""
