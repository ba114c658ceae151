//! The receiving end of calls between members: `/raft/{id}/…` on the cluster listener, one by one or over a line
//! ([`line`](mod@line)).

use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Extension, Router};
use bytes::Bytes;
use flynn_api::discovery::Consistency;
use flynn_api::server::{Json, Peer};
use flynn_api::{Error, ErrorCode};
use hyper_util::rt::TokioIo;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::line::{self, answerer};
use super::{Snapshot, SnapshotMeta, TypeConfig, Vote, snapshot};
use crate::claims::Beat;
use crate::command::Command;
use crate::http::auth::{Action, Door};
use crate::members::{self, MemberChange};
use crate::node::{Forwarded, Node};

/// How long what the leader sends may wait for this member's disk.
const APPEND: Duration = Duration::from_secs(2);

/// The routes.
pub fn routes() -> Router<(Node, Door)> {
    Router::new()
        .route("/raft/{id}/{call}", post(call))
        .route("/raft/members", post(change_members))
}

async fn change_members(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
    Json(change): Json<MemberChange>,
) -> Result<Json<()>, Error> {
    door.check(&peer, &Action::Raft)?;
    members::change(&node, &change).await?;
    Ok(Json(()))
}

async fn call(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
    Path((id, call)): Path<(u64, String)>,
    request: Request,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Raft)?;
    if node.was(id) {
        // Members that are left of the old cluster follow (`recovery::follow`).
        let message = format!(
            "member {id} goes on as {}, in a cluster of its own: an operator has recovered or restored it",
            node.id()
        );
        return Err(Error::new(ErrorCode::Gone, message));
    }
    if id != node.id() {
        let message = format!(
            "this is member {}, not {id}: the address has another owner now",
            node.id()
        );
        return Err(Error::new(ErrorCode::Conflict, message));
    }
    if call == line::NAME {
        return take_line(node, request);
    }
    let body = axum::body::to_bytes(request.into_body(), line::MAX_FRAME)
        .await
        .map_err(|_| Error::validation("the call is cut short or too long"))?;
    let said = answer(&node, &call, &body).await?;
    Ok(([(CONTENT_TYPE, "application/json")], said).into_response())
}

/// Has the connection of this request be a line from now on.
fn take_line(node: Node, mut request: Request) -> Result<Response, Error> {
    let asked = request.headers().get(UPGRADE);
    if asked.is_none_or(|protocol| protocol != line::PROTOCOL) {
        let message = format!("this call wants the header `Upgrade: {}`", line::PROTOCOL);
        return Err(Error::validation(message));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let closing = node.closing.clone();
        let Some(Ok(connection)) = closing.run_until_cancelled(upgrade).await else {
            return;
        };
        let handle = |name: String, body: Bytes| {
            let node = node.clone();
            async move { answer(&node, &name, &body).await }
        };
        answerer::answer(TokioIo::new(connection), node.closing.clone(), handle).await;
    });
    let headers = [(CONNECTION, "Upgrade"), (UPGRADE, line::PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Answers a call by its name.
async fn answer(node: &Node, name: &str, body: &[u8]) -> Result<Vec<u8>, Error> {
    match name {
        "append" => {
            let rpc: AppendEntriesRequest<TypeConfig> = parse(body)?;
            // The caller has given up by then; while the disk is full or stuck, more and more would wait.
            let answered = tokio::time::timeout(APPEND, node.raft.append_entries(rpc)).await;
            let answered = answered
                .map_err(|_| Error::unavailable("this member's disk does not take what it is to keep"))?;
            if matches!(&answered, Ok(taken) if !matches!(taken, AppendEntriesResponse::HigherVote(_))) {
                node.hear_leader();
            }
            answered_by(answered)
        }
        "vote" => {
            let rpc: VoteRequest<TypeConfig> = parse(body)?;
            answered_by(node.raft.vote(rpc).await)
        }
        "pre-vote" => {
            let rpc: VoteRequest<TypeConfig> = parse(body)?;
            answered_by(node.raft.pre_vote(rpc).await)
        }
        "transfer-leader" => {
            let rpc: TransferLeaderRequest<TypeConfig> = parse(body)?;
            answered_by(node.raft.handle_transfer_leader(rpc).await)
        }
        "snapshot" => {
            let ((vote, meta), data) = snapshot::decode::<(Vote, SnapshotMeta)>(body)
                .map_err(|why| Error::validation(format!("the snapshot cannot be read: {why}")))?;
            let snapshot = Snapshot {
                meta,
                snapshot: data.to_vec(),
            };
            answered_by(node.raft.install_full_snapshot(vote, snapshot).await)
        }
        "write" => {
            let command: Command = parse(body)?;
            written(&node.write_here(&command).await?)
        }
        "writes" => {
            let commands: Vec<Command> = parse(body)?;
            written(&node.write_all_here(commands).await)
        }
        "read-index" => {
            // Earlier releases say nothing, and want it linearizable.
            let wanted: Option<Consistency> = parse(body)?;
            let wanted = wanted.unwrap_or(Consistency::Linearizable);
            written(&node.read_index(wanted).await?)
        }
        "members" => {
            let change: MemberChange = parse(body)?;
            written(&members::change_here(node, &change).await?)
        }
        "member-status" => {
            let all = node.leads().map(|_| members::status_here(node));
            written(&all.map_or(Forwarded::NotLeader, Forwarded::Taken))
        }
        "beat" => {
            let beat: Beat = parse(body)?;
            written(&node.beat(beat))
        }
        "ages" => {
            let members: Vec<u64> = parse(body)?;
            written(&node.ages(&members))
        }
        _ => Err(Error::not_found("call", name)),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|why| Error::validation(format!("the call cannot be read: {why}")))
}

fn written(answer: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(answer).map_err(|why| Error::internal(format!("the answer cannot be written: {why}")))
}

fn answered_by<T: Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Result<Vec<u8>, Error> {
    match result {
        Ok(answer) => written(&answer),
        Err(error) => Err(Error::unavailable(format!(
            "this member cannot take the call: {error}"
        ))),
    }
}
