//! The load balancer's programs, one packet at a time: named packets, what is decided about each, and what it is like
//! afterwards.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

mod bench;
mod errors;
mod flows;
mod frames;
mod paths;
#[path = "../support/mod.rs"]
mod support;
mod xdp;

fn main() {
    support::main(
        &["ip"],
        |_| None,
        &[
            (
                "what_is_not_for_a_vip_goes_on",
                paths::what_is_not_for_a_vip_goes_on,
            ),
            (
                "a_container_here_gets_it_translated",
                paths::a_container_here_gets_it_translated,
            ),
            (
                "another_host_gets_it_through_a_tunnel",
                paths::another_host_gets_it_through_a_tunnel,
            ),
            ("a_tunnelled_packet_arrives", paths::a_tunnelled_packet_arrives),
            ("answers_go_back_as_asked", paths::answers_go_back_as_asked),
            (
                "flows_stay_while_backends_drain",
                flows::flows_stay_while_backends_drain,
            ),
            (
                "a_connection_is_sought_where_its_slot_was",
                flows::a_connection_is_sought_where_its_slot_was,
            ),
            (
                "a_connection_by_another_port_stays",
                flows::a_connection_by_another_port_stays,
            ),
            ("affinity_is_by_client", flows::affinity_is_by_client),
            (
                "a_port_is_free_again_when_its_connection_is_over",
                flows::a_port_is_free_again_when_its_connection_is_over,
            ),
            (
                "two_vips_and_one_port_of_a_client",
                flows::two_vips_and_one_port_of_a_client,
            ),
            ("errors_find_their_backend", errors::errors_find_their_backend),
            (
                "backends_errors_are_translated",
                errors::backends_errors_are_translated,
            ),
            (
                "the_limit_of_what_is_received_holds",
                paths::the_limit_of_what_is_received_holds,
            ),
            ("too_big_is_answered", errors::too_big_is_answered),
            ("a_flood_is_not_remembered", flows::a_flood_is_not_remembered),
            ("xdp_sends_to_other_hosts", xdp::xdp_sends_to_other_hosts),
            (
                "what_was_set_survives_its_process",
                flows::what_was_set_survives_its_process,
            ),
            (
                "what_an_older_layout_held_is_kept",
                flows::what_an_older_layout_held_is_kept,
            ),
            ("no_packet_passes_a_bound", paths::no_packet_passes_a_bound),
        ],
    )
}
