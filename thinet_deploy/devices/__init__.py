"""Machines that engines run on, and what is asked of them: over ssh, over adb."""
