//! From a keystroke to its echo, over the API, a terminal, and a program that answers.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::host::{AttachRequest, TtySize, attach};
use tokio::io::AsyncRead;
use tokio::time::timeout;

use super::ours::{Host, PATIENCE};
use super::subject;
use crate::row::{Goal, Row, Subject, median};
use crate::samples::percentile;
use crate::suites::Thoroughness;

/// Between keystrokes.
const PAUSE: Duration = Duration::from_millis(3);

/// The row of [`measure`].
pub(super) const SUBJECTS: [Subject; 1] = [subject(
    "attached: keystroke to echo, 99 of 100 within",
    "ms",
    None,
    Goal::AtMost(5.0),
)];

/// Takes the row.
pub(super) fn measure(host: &Host, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let count = thoroughness.pick(500, 5_000);
    let mut job = host.speaking(&host.image, "stty raw -echo; echo ready; exec cat");
    job.config.tty = true;
    job.config.tty_size = Some(TtySize {
        columns: 80,
        lines: 24,
    });
    let samples = host.runtime.block_on(async {
        let started = host.start(&job).await?;
        let connection = host
            .api
            .attach(&AttachRequest {
                job_id: started.id.clone(),
                flags: ["stdin", "stdout"].map(str::to_owned).into(),
                ..AttachRequest::default()
            })
            .await?;
        let (mut read, mut write) = tokio::io::split(connection);
        let mut seen = Vec::new();
        while !seen.ends_with(b"ready\n") {
            seen.extend(said(&mut read).await?);
        }
        let mut samples = Vec::new();
        for number in 0..count {
            let key = b'a' + u8::try_from(number % 26)?;
            let begun = Instant::now();
            write_frame(&mut write, attach::STDIN, &[key]).await?;
            let echo = said(&mut read).await?;
            samples.push(begun.elapsed().as_secs_f64() * 1e3);
            ensure!(echo == [key], "{key} was echoed as {echo:?}");
            tokio::time::sleep(PAUSE).await;
        }
        host.api.signal_job(&job.id, 9).await?;
        anyhow::Ok(samples)
    })?;
    let most = percentile(&samples, 99);
    eprintln!(
        "    half within {:.2} ms, 99 of 100 within {most:.2} ms",
        median(&samples).unwrap_or_default()
    );
    Ok(vec![SUBJECTS[0].figure(most, samples.len())])
}

/// What the job says next.
async fn said(read: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>> {
    let frame = timeout(PATIENCE, read_frame(read))
        .await
        .context("the job says nothing")??
        .context("the job has ended")?;
    match frame.kind {
        attach::STDOUT => Ok(frame.payload),
        kind => bail!(
            "a frame of kind {kind}: {}",
            String::from_utf8_lossy(&frame.payload)
        ),
    }
}
