//! This process's terminal: its size, and raw mode that ends whatever happens.

use std::io::{self, IsTerminal as _};

use flynn_api::host::TtySize;
use rustix::termios::{self, OptionalActions, Termios};

/// Whether standard input and output are a terminal.
pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// The terminal's size.
pub(crate) fn size() -> Option<TtySize> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    Some(TtySize {
        columns: size.ws_col,
        lines: size.ws_row,
    })
}

/// Keys go to the job as they are pressed, until this is dropped.
pub(crate) struct RawMode(Termios);

impl RawMode {
    pub(crate) fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
